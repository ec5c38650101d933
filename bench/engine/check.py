"""Did every engine do the same work? Compare the "check" outputs in result files with float32.

    python check.py --model out/bench-engine/model results.jsonl ...
For each line: how many of the first 16 greedy tokens match transformers' own float32 output before
the first difference (mean over 8 prompts), and, feeding the engine's own tokens to the float32
model, the share that is its top choice and the mean logit gap to the top choice. A random model's
logits are close together, so a rounding flip is normal; a wrong model shows a gap of several units.
Needs: torch, transformers.
"""

import argparse
import json
from pathlib import Path

import common


class Reference:
    """The float32 model and its own greedy continuation of the check prompts."""

    def __init__(self, model):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.prompts = torch.tensor(common.check_prompts())
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=common.CHECK_NEW,
            min_new_tokens=common.CHECK_NEW,
            eos_token_id=None,
            pad_token_id=0,
        )
        ones = torch.ones_like(self.prompts)
        answer = self.model.generate(self.prompts, attention_mask=ones, generation_config=greedy)
        self.start = self.prompts.shape[1]
        self.wanted = answer[:, self.start :].tolist()

    def compare(self, tokens):
        """``tokens``: one list per check prompt. Leading equal, top-1 share, mean and worst gap."""
        equal = [
            next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), len(want))
            for got, want in zip(tokens, self.wanted, strict=True)
        ]
        got = self.torch.tensor(tokens)
        logits = self.model(self.torch.cat([self.prompts, got], 1)).logits
        logits = logits[:, self.start - 1 : -1].float()
        gap = logits.max(-1).values - logits.gather(-1, got[..., None])[..., 0]
        return {
            "leading_equal": sum(equal) / len(equal),
            "top1": (gap == 0).float().mean().item(),
            "mean_gap": gap.mean().item(),
            "worst_gap": gap.max().item(),
        }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(Path(__file__).parent / "model"))
    parser.add_argument("results", nargs="+", type=Path)
    a = parser.parse_args()
    reference = Reference(a.model)
    for path in a.results:
        for text in path.read_text().splitlines():
            line = json.loads(text) if text.startswith("{") else {}
            if "check" in line:
                found = reference.compare(line["check"])
                figures = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
                print(f"{line['engine']} {line['precision']} {line['mode']}: {figures}")


if __name__ == "__main__":
    main()
