"""python -m benchmarks.plan [section.key=value ...] --preset image_huge14 --gpus 64: how to train it on many GPUs.

For ZeRO 0 to 3 and tensor parallelism 1 to 8: memory of a GPU, bytes that it sends for a step, the step's time from the
given FLOP/s and bandwidths, and which to take. Everything is computed; nothing runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from benchmarks.step import ROOT
from models.config import ModelConfig
from models.split import split_problem
from pretrain.config import BatchPlan, Config, batch_plan, load, nearest_divisors
from pretrain.engine import engine_config, read_mechanics
from pretrain.layout import Zero
from pretrain.plan import GIB, Memory, memory, samples, useful_work
from pretrain.settings import ConfigError
from pretrain.traffic import Traffic, traffic

STAGES, TENSOR_PARALLEL = (0, 1, 2, 3), (1, 2, 4, 8)
Problems = dict[tuple[int, str], list[int]]  # (tensor parallelism, why not) -> at which stages
CLOSE = 1.03  # steps that differ by less are alike
PREFERRED = (1, 2, 0, 3)  # stage 1 sends what stage 0 does, holds less and, in bf16, has low-precision weights


@dataclass(frozen=True)
class Cluster:
    """`flops` is a GPU's datasheet rate in the preset's precision, `efficiency` what of it useful matrix work reaches.
    Bandwidths are those of one GPU in one direction, bytes a second. `latency`: seconds of a collective, times log2 of
    its ranks. `overlap`: share of the data-parallel traffic that hides behind computing. `margin`: share of
    `gpu_memory`, in GiB, that is to stay free."""

    flops: float = 989e12
    efficiency: float = 0.4
    gpu_memory: float = 80
    intra_bandwidth: float = 450e9
    inter_bandwidth: float = 50e9
    gpus_per_node: int = 8
    latency: float = 10e-6
    overlap: float = 0.0
    margin: float = 0.1


@dataclass(frozen=True)
class Way:
    """One way to train `config` on some GPUs."""

    config: Config
    zero: Zero
    plan: BatchPlan
    memory: Memory
    traffic: Traffic
    cluster: Cluster

    @property
    def tensor_parallel(self) -> int:
        return self.config.train.tensor_parallel

    @property
    def gpus(self) -> int:
        return self.plan.ranks * self.tensor_parallel

    @property
    def fits(self) -> bool:
        return self.memory.total <= (1 - self.cluster.margin) * self.cluster.gpu_memory * GIB

    @property
    def computing(self) -> float:
        """Seconds. Tensor parallelism splits the blocks alone: each of its ranks computes local encoder and decoder."""
        work = useful_work(self.config.model)
        each = work.total - work.blocks + work.blocks / self.tensor_parallel
        count = samples(self.config.model, self.plan.micro_batch) * self.plan.accumulation
        return each * count / (self.cluster.flops * self.cluster.efficiency)

    @property
    def sending(self) -> float:
        """Seconds that nothing hides. Data-parallel peers on several nodes form rings that together use the links of
        all who are in one node: with more tensor parallelism fewer, for less to send."""
        cluster = self.cluster
        across = within = cluster.intra_bandwidth
        if self.gpus > cluster.gpus_per_node:
            peers = max(1, cluster.gpus_per_node // self.tensor_parallel)
            across = min(across, peers * cluster.inter_bandwidth)
        if cluster.gpus_per_node % self.tensor_parallel and self.gpus > cluster.gpus_per_node:  # peers in two nodes
            within = cluster.inter_bandwidth
        data, split = self.traffic.data_parallel, self.traffic.tensor_parallel
        of_data = data.bytes / across + data.calls * cluster.latency * math.log2(self.plan.ranks)
        of_split = split.bytes / within + split.calls * cluster.latency * math.log2(self.tensor_parallel)
        return (1 - cluster.overlap) * of_data + of_split

    @property
    def seconds(self) -> float:
        return self.computing + self.sending

    @property
    def rate(self) -> float:
        """Samples a second."""
        return samples(self.config.model, self.config.train.batch_size) / self.seconds

    @property
    def name(self) -> str:
        return f"ZeRO {self.zero.stage}" + (f" x TP {self.tensor_parallel}" if self.tensor_parallel > 1 else "")


def micro_batches(config: Config, gpus: int) -> Iterator[BatchPlan]:
    """Plans for the preset's micro-batch, or else for all that divide a rank's share, the largest first.

    Raises ConfigError if the batch does not divide over the ranks."""
    train, unit = config.train, config.model.sample_size
    plan = batch_plan(train, gpus)
    if train.micro_batch:
        yield plan
        return
    share = plan.micro_batch // unit
    for count in sorted(nearest_divisors(share, share, share), reverse=True):
        yield batch_plan(replace(train, micro_batch=count * unit), gpus)


def way(config: Config, gpus: int, cluster: Cluster) -> Way:
    """The one with the largest micro-batch that fits, or with the smallest that there is."""
    zero = Zero.of(read_mechanics(config.train.deepspeed))
    for plan in micro_batches(config, gpus):
        engine_config(config, plan)  # which refuses some
        found = Way(config, zero, plan, memory(config, plan, zero), traffic(config, plan, zero), cluster)
        if found.fits:
            break
    return found


def ways(path: Path, overrides: Sequence[str], gpus: int, cluster: Cluster) -> tuple[list[Way], Problems]:
    """All that can be, and why the others cannot."""
    found: list[Way] = []
    problems: Problems = {}
    for size, stage in product(TENSOR_PARALLEL, STAGES):
        ours = [f"train.tensor_parallel={size}", f"train.deepspeed=ds_configs/zero{stage}.json"]
        try:
            found.append(way(load(path, [*overrides, *ours]), gpus, cluster))
        except ConfigError as error:
            problems.setdefault((size, str(error)), []).append(stage)
    return found, problems


def best(found: Sequence[Way]) -> Way | None:
    """Of those that fit and whose step is about as short as any, the one with the least tensor parallelism, and then
    the first of `PREFERRED`."""
    fitting = [one for one in found if one.fits]
    shortest = min((one.seconds for one in fitting), default=0.0)
    alike = [one for one in fitting if one.seconds <= CLOSE * shortest]
    return min(alike, key=lambda one: (one.tensor_parallel, PREFERRED.index(one.zero.stage)), default=None)


HEAD = (
    *("ZeRO", "TP", "batch of a rank", "states, GiB", "in a step, GiB", "GPU, GiB", "gradients, GB", "gathering, GB"),
    *("weights, GB", "teacher, GB", "TP, GB", "sent, GB", "computing, s", "sending, s", "step, s"),
)


def table(found: Sequence[Way], problems: Problems, model: ModelConfig) -> str:
    """Markdown, a row a way."""
    rows = [[*HEAD, f"{model.unit}/s", ""]]
    for one in found:
        use, sent, plan = one.memory, one.traffic, one.plan
        kinds = (sent.gradients, sent.gathering, sent.weights, sent.teacher, sent.tensor_parallel)
        rows.append([
            *(str(one.zero.stage), str(one.tensor_parallel)),
            f"{samples(model, plan.micro_batch)} x {plan.accumulation}",
            *(f"{size / GIB:.2f}" for size in (use.states, use.total - use.states, use.total)),
            *(f"{kind.bytes / 1e9:.2f}" for kind in kinds),
            f"{sent.total / 1e9:.2f}",
            *(f"{seconds:.4f}" for seconds in (one.computing, one.sending, one.seconds)),
            f"{one.rate:,.0f}",
            "" if one.fits else "does not fit",
        ])  # fmt: skip
    for (size, why), stages in problems.items():
        rows.append([", ".join(map(str, stages)), str(size), *[""] * (len(HEAD) - 1), f"cannot be: {why}"])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def fewer(config: Config, path: Path, overrides: Sequence[str], gpus: int, cluster: Cluster) -> Way | None:
    """The fastest way on fewer GPUs, of those that have one, two or four samples of a batch on every rank; of ways
    about as fast the one on fewest."""
    batch = samples(config.model, config.train.batch_size)
    counts = {batch // share * size for share in (1, 2, 4) if batch % share == 0 for size in TENSOR_PARALLEL}
    each = [best(ways(path, overrides, count, cluster)[0]) for count in sorted(counts) if count < gpus]
    fitting = [one for one in each if one]
    fastest = max((one.rate for one in fitting), default=0.0)
    return next((one for one in fitting if one.rate * CLOSE >= fastest), None)


def advice(found: Sequence[Way], gpus: int, config: Config, rival: Way | None) -> str:
    """Which way to take, and how the others compare, among them a `rival` on fewer GPUs; or why there is none, and what
    would help."""
    chosen, text = best(found), f"{gpus:,} GPUs: "
    if chosen:
        text += f"{described(chosen)} Against it, in step time: {comparison(chosen, found)}."
        if samples(config.model, config.train.batch_size) == chosen.plan.ranks:
            text += " Every rank has one sample: more GPUs need more tensor parallelism, or a larger batch."
    elif found:
        least = min(found, key=lambda one: one.memory.total)
        text += (
            f"nothing fits. {least.name} needs least, {least.memory.total / GIB:.1f} GiB, of which activations "
            f"{least.memory.activations / GIB:.1f}; a smaller micro-batch, more memory or "
            "ds_configs/zero3_offload.json would help."
        )
    else:
        text += too_many(gpus, config)
    if rival and (not chosen or rival.rate * CLOSE > chosen.rate):
        text += f" Fewer are {'no slower' if chosen else 'fastest so'}: {rival.gpus:,} GPUs, {described(rival)}"
    return text


def described(one: Way) -> str:
    model, plan = one.config.model, one.plan
    return (
        f"**{one.name}**, {plan.ranks} data-parallel ranks x {samples(model, plan.micro_batch)} x {plan.accumulation} "
        f"accumulated: {one.seconds:.4f} s a step, {one.rate:,.0f} {model.unit}/s, {one.computing / one.seconds:.0%} "
        f"of the time computing, {one.memory.total / GIB:.1f} GiB of {one.cluster.gpu_memory:g}."
    )


def comparison(chosen: Way, found: Sequence[Way]) -> str:
    """The other stages at the same tensor parallelism, and the other sizes of that at their best."""

    def against(other: Way) -> str:
        change = round(other.seconds / chosen.seconds - 1, 2)
        return "does not fit" if not other.fits else f"{change:+.0%}" if change else "the same"

    stages = [
        f"ZeRO {one.zero.stage} {against(one)}"
        for one in found
        if one.tensor_parallel == chosen.tensor_parallel and one is not chosen
    ]
    sizes = []
    for size in TENSOR_PARALLEL:
        alike = [one for one in found if one.tensor_parallel == size]
        if not alike:
            sizes.append(f"TP {size} cannot be")
        elif size != chosen.tensor_parallel:
            sizes.append(f"TP {size} {against(min(alike, key=lambda one: (not one.fits, one.seconds)))}")
    return ", ".join(stages) + "; " + ", ".join(sizes)


def too_many(gpus: int, config: Config) -> str:
    """Why the batch falls on no number of data-parallel ranks that so many GPUs can form."""
    model = config.model
    batch, widest = (
        samples(model, config.train.batch_size),
        max(n for n in TENSOR_PARALLEL if not split_problem(model, n)),
    )
    if gpus <= batch * widest:
        fit = ", ".join(map(str, nearest_divisors(batch, gpus, 8)))
        return f"a batch of {batch} {model.unit} divides over none of the data-parallel ranks; {fit} would do."
    return (
        f"a batch of {batch} {model.unit} is smaller than the {gpus // widest:,} data-parallel ranks that even TP "
        f"{widest} leaves. It occupies at most {batch * widest:,} GPUs, at TP {widest} and one of the {model.unit} a "
        f"rank. A larger batch, --batch {gpus // widest} with TP {widest} or {gpus} without, is another experiment: "
        "fewer updates see as much data, and rate, warm-up and the teacher's decay have to be found again."
    )


def report(config: Config, path: Path, overrides: Sequence[str], gpus: int, cluster: Cluster, brief: bool) -> str:
    """The table and the advice for one number of GPUs; the advice alone if `brief`."""
    found, problems = ways(path, overrides, gpus, cluster)
    said = f"- {advice(found, gpus, config, fewer(config, path, overrides, gpus, cluster))}"
    return said if brief else f"{table(found, problems, config.model)}\n\n{said}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.plan", description="How to train a preset on many GPUs, computed.")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--preset", default="image_huge14", help="a configuration of configs/pretrain, without .yaml")
    parser.add_argument("--gpus", type=int, nargs="+", default=[64])
    parser.add_argument(
        "--batch", type=int, help="global: images, blocks or clips of full length; the preset's if not given"
    )
    parser.add_argument("--micro-batch", type=int, help="likewise, of a rank; the largest that fits if not given")
    parser.add_argument("--brief", action="store_true", help="advice without tables")
    for field in fields(Cluster):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    args = parser.parse_intermixed_args(arguments)
    cluster = Cluster(**{field.name: getattr(args, field.name) for field in fields(Cluster)})
    path, overrides = ROOT / "configs" / "pretrain" / f"{args.preset}.yaml", list(args.overrides)
    try:
        unit = load(path, overrides).model.sample_size
        for key, count in (("batch_size", args.batch), ("micro_batch", args.micro_batch)):
            overrides += [f"train.{key}={count * unit}"] if count else []
        config = load(path, overrides)
        parts = [report(config, path, overrides, gpus, cluster, args.brief) for gpus in args.gpus]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = ("\n" if args.brief else "\n\n").join(parts)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
