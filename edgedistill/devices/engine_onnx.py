"""Run one ONNX model folder for timing through onnxruntime-genai: the same tests as engine_gguf's."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from edgedistill.devices.protocol import Messages
from edgedistill.errors import StepFailed, UsageError
from edgedistill.model_facts import read_json


class OnnxEngine:
    """One loaded onnxruntime-genai model, in the process that measures it."""

    def __init__(self, path: Path, threads: int) -> None:
        try:
            import onnxruntime_genai
        except ImportError:
            raise UsageError("onnxruntime-genai is not installed", "pip install 'edgedistill[onnx]'") from None
        self.api: Any = onnxruntime_genai
        self.path = path
        settings = read_json(path / "genai_config.json").get("model")
        if not isinstance(settings, dict):
            raise UsageError(f"{path / 'genai_config.json'}: says nothing of a model", "build the ONNX folder again")
        self.settings = settings
        self.random = random.Random(0)
        try:
            config = self.api.Config(str(path))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
            self.model = self.api.Model(config)
        except RuntimeError as error:
            raise UsageError(
                f"{path}: onnxruntime-genai cannot load it: {str(error)[:300]}", "edgedistill doctor"
            ) from None
        self.tokenizer = self.api.Tokenizer(self.model)
        self.held: Any = None

    def describe(self) -> dict[str, str]:
        """Name the engine and the versions of its two packages."""
        from importlib.metadata import version

        return {
            "engine": "onnxruntime-genai",
            "version": f"onnxruntime-genai {version('onnxruntime-genai')}",
            "commit": f"onnxruntime {version('onnxruntime')}",
            "build": "CPU execution provider",
        }

    def bytes_per_token(self) -> tuple[int, bool]:
        """Return (bytes of the model's files, False): which of them a token reads is not known from outside."""
        name = self.settings["decoder"]["filename"]
        return sum(file.stat().st_size for file in self.path.glob(f"{Path(name).stem}*")), False

    def prompt(self, n: int) -> float:
        """Return the seconds that processing ``n`` random tokens takes from an empty cache."""
        generator, tokens = self._generator(n + 1), self._random_tokens(n)
        start = time.perf_counter()
        generator.append_tokens(tokens)
        return time.perf_counter() - start

    def generate(self, n: int) -> float:
        """Return the seconds that ``n`` tokens take one after the other from an empty cache."""
        generator, tokens = self._generator(n + 1), self._random_tokens(n)
        start = time.perf_counter()
        for token in tokens:
            generator.append_tokens([token])
        return time.perf_counter() - start

    def answer(self, messages: Messages, limit: int, context: int) -> tuple[float, float, int, int]:
        """Answer greedily; return (seconds to the first token, seconds to the last, prompt tokens, new tokens)."""
        start = time.perf_counter()
        try:
            text = self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        except RuntimeError as error:
            raise UsageError(
                f"{self.path}: the chat template fails: {str(error)[:200]}", "measure without prompts"
            ) from None
        tokens = list(self.tokenizer.encode(text))
        if len(tokens) + limit > context:
            raise UsageError(
                f"a prompt of {len(tokens)} tokens and an answer of {limit} do not fit a context of {context}",
                "raise the target's runtime.context or shorten the prompt",
            )
        generator = self._generator(context)
        generator.append_tokens(tokens)
        first, made = 0.0, 0
        while made < limit and not generator.is_done():
            generator.generate_next_token()
            made += 1
            first = first or time.perf_counter() - start
        return first, time.perf_counter() - start, len(tokens), made

    def fill(self, context: int, prompt: int) -> None:
        """Hold a KV cache of ``context`` tokens and process a prompt in it: the memory that a chat takes."""
        self.held = self._generator(context)
        self.held.append_tokens(self._random_tokens(min(prompt, context - 1)))
        self.held = None

    def _generator(self, room: int) -> Any:
        if room > int(self.settings.get("context_length", room)):
            raise StepFailed(f"{self.path}: its context is {self.settings['context_length']} tokens, asked for {room}")
        params = self.api.GeneratorParams(self.model)
        params.set_search_options(max_length=room, do_sample=False)
        return self.api.Generator(self.model, params)

    def _random_tokens(self, n: int) -> list[int]:
        ends = self.settings.get("eos_token_id", [])
        ends = set(ends) if isinstance(ends, list) else {ends}  # after one of these the generator takes no more tokens
        known = [token for token in range(min(int(self.settings["vocab_size"]), 4096)) if token not in ends]
        return self.random.choices(known, k=n)
