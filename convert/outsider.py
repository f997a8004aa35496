"""What somebody gets of a Hugging Face folder who has transformers and not this project: a script, started by its path
in a process of its own, which imports nothing of the project and asks no network.

python -P convert/outsider.py FOLDER WORK: reads WORK/request.json ({"auto": class, "options": for its from_pretrained,
"texts": for the tokenizer if there are any}) and WORK/inputs.safetensors, the model's arguments by name; writes
WORK/outputs.safetensors ({"output": the first output}) and WORK/answer.json.
"""

import json
import sys
from pathlib import Path


def main(folder: str, work: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.utils.logging.disable_progress_bar()
    request = json.loads((work / "request.json").read_text())
    auto = getattr(transformers, request["auto"])
    trust = {"trust_remote_code": True, "local_files_only": True}
    model, loaded = auto.from_pretrained(folder, output_loading_info=True, **trust, **request["options"])
    with torch.inference_mode():
        output = model.eval()(**load_file(work / "inputs.safetensors"))[0]
    save_file({"output": output.contiguous()}, work / "outputs.safetensors")
    answer = {"class": type(model).__name__, "strange": {k: sorted(map(str, v)) for k, v in loaded.items() if v}}
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
        answer |= {"ids": tokenizer(request["texts"])["input_ids"], "pad": tokenizer.pad_token_id}
    (work / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
