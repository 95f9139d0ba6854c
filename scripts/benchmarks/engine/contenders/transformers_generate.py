"""transformers' `generate`: static batches, the same weights and dtype."""

from __future__ import annotations

import os
from typing import Any

from scripts.benchmarks.engine.contenders.turns import Handler, Stamps, prompts, take_turns


def load(settings: dict[str, Any]) -> dict[str, Handler]:
    """The model, as transformers runs it by default."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), local_files_only=True
    ).eval()

    def decode(*, batch: int, tokens: int, length: int, seed: int) -> dict[str, Any]:
        stamps = Stamps()

        def stamp(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            stamps.stamp(batch)
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts(batch, length=length, seed=seed))
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=None,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[stamp],
            )
        return stamps.since(0)

    return {"decode": decode}


if __name__ == "__main__":
    take_turns(load)
