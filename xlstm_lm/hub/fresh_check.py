"""Load an export as a stranger would, and compare it with what the trained model said. Run as a script, by gate.py.

It imports nothing from xlstm-lm and hides xlstm_lm from the model's own code, which must do without.
"""

import json
import os
import sys
from pathlib import Path

folder, question = Path(sys.argv[1]), Path(sys.argv[2])
sys.modules["xlstm_lm"] = None  # to import it raises ImportError, as where it is not installed
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = str(question / "modules")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

transformers.utils.is_xlstm_available = lambda: False  # its kernels are not what is looked at here


def main() -> None:
    """Print one line of JSON: what is wrong, and the largest difference between logits."""
    asked = json.loads((question / "question.json").read_text(encoding="utf-8"))
    tensors = load_file(question / "answers.safetensors")
    trust = {"trust_remote_code": True} if asked["remote_code"] else {}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", output_loading_info=True, **trust
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **trust)
    problems = [f"{what}: {sorted(names)}" for what, names in info.items() if names]
    differences = [0.0]

    def compare(what: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
        difference = float((logits - expected).abs().max())
        differences.append(difference)
        if not difference <= asked["tolerance"] * max(1.0, float(expected.abs().max())):
            problems.append(f"{what}: logits differ by {difference:.2e}")

    for prompt in asked["texts"]:
        ids = tokenizer(prompt["text"]).input_ids
        if ids != prompt["ids"]:
            problems.append(f"the tokenizer makes {ids} of {prompt['text']!r} instead of {prompt['ids']}")
    greedy = {"max_new_tokens": asked["new_tokens"], "do_sample": False}
    greedy["suppress_tokens"] = asked["padded_rows"] or None
    with torch.inference_mode():
        for name in asked["logits"]:
            tokens = tensors[f"{name}.tokens"]
            compare(f"batch of {tokens.shape[0]} at length {tokens.shape[1]}", model(tokens).logits, tensors[name])
        prompts = asked["texts"]
        if asked["leaves_out_padding"]:
            longest = max(len(prompt["ids"]) for prompt in prompts)
            padding = [longest - len(prompt["ids"]) for prompt in prompts]
            rows = [[tokenizer.pad_token_id] * n + prompt["ids"] for n, prompt in zip(padding, prompts, strict=True)]
            mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
            logits = model(torch.tensor(rows), attention_mask=mask).logits
            for row, prompt, n in zip(logits, prompts, padding, strict=True):
                compare(f"{n} padded positions on the left", row[n:], tensors[f"{prompt['name']}.logits"])
            generated = model.generate(torch.tensor(rows), attention_mask=mask, **greedy)[:, longest:]
        else:
            generated = [model.generate(torch.tensor([p["ids"]]), **greedy)[0, len(p["ids"]) :] for p in prompts]
    for prompt, tokens in zip(prompts, generated, strict=True):
        pairs = list(zip(tokens.tolist(), prompt["greedy"], prompt["margins"], strict=False))
        wrong = next((index for index, (ours, expected, _) in enumerate(pairs) if ours != expected), None)
        # Where two tokens are as good as equally likely, rounding decides, and the texts part.
        if wrong is not None and pairs[wrong][2] > asked["tolerance"]:
            problems.append(f"greedy generation from {prompt['text'][:20]!r} differs at its token {wrong}")
    print(json.dumps({"problems": problems, "difference": max(differences)}))


main()
