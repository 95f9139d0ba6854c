"""A model run by torch through transformers' model classes, one generation at a time.

Imported only in the engine's own process: torch takes two seconds and 250 MB.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pinaivu_node.engine.config import EngineConfig
from pinaivu_node.engine.prompts import PromptEncoder
from pinaivu_node.engine.sampling import Sampler
from pinaivu_node.engine.text import AnswerText, WindowDetokenizer
from pinaivu_node.engine.types import (
    FinishReason,
    GenerationRequest,
    PromptRefused,
    SamplingParams,
    TokenEvent,
)

_CONTEXT_TOKENS: Final = 4
"""End of the prompt that the detokenizer sees: enough for a leading space or a split character."""
_WARM_UP_TOKENS: Final = (2, 8)
"""The first pass loads every kernel, the second is measured."""


class LoadError(Exception):
    """This folder cannot be run here; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What the warm-up measured."""

    tokens_per_second: float
    ttft_ms: int


class TorchModel:
    """Weights, tokenizer and what they were found to be."""

    def __init__(self, model: Any, tokenizer: Any, *, config: EngineConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.prefill_chunk = config.prefill_chunk
        text_config = model.config.get_text_config()
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.context_window = min(
            int(getattr(text_config, "max_position_embeddings", 2**20)),
            config.context_window or 2**31,
        )
        self.eos_ids = _eos_ids(model, tokenizer)
        self._encoder = PromptEncoder(tokenizer, random_word=lambda: "p" + secrets.token_hex(16))

    @classmethod
    def load(cls, config: EngineConfig) -> TorchModel:
        """The model in this folder, on the device; LoadError if it cannot be."""
        device = _device(config.device)
        if device.type == "cpu":
            # One core is left for the event loops around: a step loop whose threads wait for a
            # core that is taken waits at every one of its thousand barriers.
            torch.set_num_threads(config.threads or max(1, torch.get_num_threads() - 1))
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(
                config.model,
                local_files_only=True,
                use_safetensors=True,  # the older format is code
                dtype=_dtype(config.dtype, device),
            )
            return cls(model.to(device).eval(), tokenizer, config=config)
        except torch.OutOfMemoryError as exc:
            raise LoadError(f"{config.model.name} does not fit in the memory of {device}") from exc
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as exc:
            raise LoadError(f"cannot load {config.model}: {exc}") from exc

    def start(self, request: GenerationRequest) -> Generation:
        """The generation, nothing computed yet; PromptRefused if the prompt cannot be run."""
        if request.sampling.logprobs is not None:
            raise PromptRefused("This engine does not report logprobs.")
        prompt = self._encoder.encode(request.prompt)
        for token_id in (*prompt, *request.resume_token_ids):
            # An index beyond the weights is an exception on a CPU, the end of the process on CUDA.
            if not 0 <= token_id < self.vocabulary:
                raise PromptRefused(f"Token id {token_id} is not in the model's vocabulary.")
        # The answer needs room for one token at least.
        if len(prompt) + len(request.resume_token_ids) >= self.context_window:
            raise PromptRefused(too_long(self.context_window, len(prompt)))
        return Generation(self, request, prompt=prompt)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special tokens left out."""
        text = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def warm_up(self) -> Speed:
        """Run a short generation, so that no client pays for the first use of every kernel."""
        for count in _WARM_UP_TOKENS:
            request = GenerationRequest(
                id="warm-up",
                prompt=tuple([min(100, self.vocabulary - 1)] * 16),
                sampling=SamplingParams(max_tokens=count, temperature=0.7, ignore_eos=True),
            )
            started = time.monotonic()
            times = [time.monotonic() for _ in self.start(request).steps()]
        decode_s = max(times[-1] - times[0], 1e-6)
        return Speed((len(times) - 1) / decode_s, round(1000 * (times[0] - started)))


class Generation:
    """One answer in the making; `step` until the event with a finish reason."""

    def __init__(self, owner: TorchModel, request: GenerationRequest, *, prompt: list[int]) -> None:
        sampling = request.sampling
        self.request = request
        self.prompt_tokens = len(prompt)
        self._owner = owner
        self._ids = list(prompt)
        self._limit = min(owner.context_window, self.prompt_tokens + sampling.max_tokens)
        """Length of the sequence at which the answer ends; resumed tokens count as produced."""
        self._computed = 0
        self._cache = DynamicCache(config=owner.model.config)
        self._sampler = Sampler(
            sampling, prompt=prompt, vocabulary=owner.vocabulary, device=owner.device
        )
        detokenizer = WindowDetokenizer(owner.decode, before=prompt[-_CONTEXT_TOKENS:])
        self._text = AnswerText(detokenizer, stops=sampling.stop)
        self._finished = FinishReason.LENGTH if sampling.max_tokens < 1 else None
        # The reader has the text of these; text and penalties go on from where they were.
        for token_id in request.resume_token_ids:
            if self._finished is None:
                _, self._finished = self._take(token_id)

    def steps(self) -> Iterator[TokenEvent]:
        """Every event of this generation, without a pause between."""
        event: TokenEvent | None = None
        while event is None or event.finish_reason is None:
            event = self.step()
            if event is not None:
                yield event

    @torch.inference_mode()
    def step(self) -> TokenEvent | None:
        """The next token; None if a long prompt needs more steps before its first."""
        if self._finished is not None:
            return self._token_event((), "", self._finished)
        end = min(self._computed + self._owner.prefill_chunk, len(self._ids))
        chunk = torch.tensor([self._ids[self._computed : end]], device=self._owner.device)
        output = self._owner.model(
            input_ids=chunk, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._computed = end
        if end < len(self._ids):
            return None
        token_id = self._sampler.choose(output.logits[0, -1], position=end)
        text, self._finished = self._take(token_id)
        return self._token_event((token_id,), text, self._finished)

    def ended(self, reason: FinishReason, *, error: str | None = None) -> TokenEvent:
        """The last event of a generation that is broken off: cancelled, or failed."""
        return self._token_event((), self._text.finish().text, reason, error=error)

    def _take(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Account for one token of the answer: what it shows, and whether it is the last."""
        self._ids.append(token_id)
        self._sampler.observe(token_id)
        if token_id in self._owner.eos_ids and not self.request.sampling.ignore_eos:
            return self._text.finish().text, FinishReason.STOP
        shown = self._text.push(token_id)
        if shown.stopped:
            return shown.text, FinishReason.STOP
        if len(self._ids) < self._limit:
            return shown.text, None
        rest = self._text.finish()
        return shown.text + rest.text, FinishReason.STOP if rest.stopped else FinishReason.LENGTH

    def _token_event(
        self,
        token_ids: tuple[int, ...],
        text: str,
        reason: FinishReason | None,
        *,
        error: str | None = None,
    ) -> TokenEvent:
        return TokenEvent(
            request_id=self.request.id,
            token_ids=token_ids,
            text=text,
            input_tokens=self.prompt_tokens,
            finish_reason=reason,
            error=error,
        )


def too_long(window: int, tokens: int) -> str:
    """The words that OpenAI's clients recognise."""
    return (
        f"This model's maximum context length is {window} tokens. "
        f"However, your messages resulted in {tokens} tokens."
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise LoadError(f"no CUDA device here, {name} was asked for: use --device cpu")
        index = torch.device(name).index or 0
        if index >= torch.cuda.device_count():
            raise LoadError(f"{name} does not exist: {torch.cuda.device_count()} CUDA device(s)")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer; folders name one, several, or only the tokenizer's."""
    declared = model.generation_config.eos_token_id
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if isinstance(i, int))
