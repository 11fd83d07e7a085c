"""The artifact that ships: manifest, model card, generation settings, Ollama Modelfile and the commands to run it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgedistill import __version__
from edgedistill.devices.table import told_load, told_runner
from edgedistill.errors import UsageError
from edgedistill.fingerprint import file_digest
from edgedistill.kv_cache import F16, KV_TYPES, OLLAMA, Pair, arguments, ggml_number, needs_flash_attention, told
from edgedistill.target import format_size

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that says what an artifact is and why it may ship. ``keys``: step id -> key; ``digests``: key ->
    digest.
    """

    recipe: str
    target: dict[str, Any]
    format: str
    keys: dict[str, str]
    digests: dict[str, str]
    sources: list[dict[str, Any]]
    evaluation: dict[str, Any]
    teacher: dict[str, Any]
    measurement: dict[str, Any]
    gates: list[dict[str, Any]]
    generation: dict[str, Any]
    size: int
    example: list[dict[str, Any]]
    tools: dict[str, str]
    draft: dict[str, Any] = field(default_factory=dict)  # what the draft brings; "refused" says why it is not here
    kv_cache: dict[str, Any] = field(default_factory=dict)  # types of the KV cache and their cost; none: f16
    files: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    edgedistill: str = __version__

    @property
    def kv(self) -> Pair:
        """Return the types of keys and values in the KV cache."""
        return (self.kv_cache["k"], self.kv_cache["v"]) if self.kv_cache else F16


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json`` of a package; raises UsageError if there is none or it is of another schema."""
    path = folder / "manifest.json"
    try:
        return Manifest(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", "give a folder that `edgedistill build` wrote under dist/") from None
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path}: not a manifest of this version ({error})", "build again") from error


def model_of(path: Path) -> Path:
    """Return the model inside a package folder (``model.gguf`` or ``onnx/``); any other path is the model itself."""
    if (path / "manifest.json").is_file():
        return path / "model.gguf" if (path / "model.gguf").is_file() else path / "onnx"
    return path


def has_chat_template(model: Path) -> bool:
    """Tell whether a GGUF file, or an ONNX folder, says how a conversation is written."""
    if not model.is_dir():
        from edgedistill.formats.gguf.read import read_info

        return bool(read_info(model).chat_template)
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    return (model / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))


def cache_of(path: Path, given: str | None) -> Pair:
    """Return the types of the KV cache that an artifact is run with: ``given`` ("q8_0", or "q8_0,q4_0" for keys and values), else
    those of its package, else f16. Raises UsageError for what is no type, and for an ONNX model.
    """
    if given is None:
        return read_manifest(path).kv if (path / "manifest.json").is_file() else F16
    names = given.split(",")
    if len(names) > 2 or any(name not in KV_TYPES for name in names):
        raise UsageError(
            f"--kv-cache {given}: no type of a KV cache", f"one of {', '.join(KV_TYPES)}; or two: keys,values"
        )
    kv = names[0], names[-1]
    if kv != F16 and model_of(path).is_dir():
        raise UsageError(f"--kv-cache is for GGUF files: {path} is an ONNX model", "leave it out")
    return kv


def write_files(out: Path, manifest: Manifest, *, grammar: str | None) -> None:
    """Write everything beside the model file into ``out``; the manifest comes last and lists the digest of each
    file.
    """
    (out / "generation.json").write_text(json.dumps(manifest.generation, indent=1, sort_keys=True) + "\n")
    if grammar:
        (out / "grammar.gbnf").write_text(grammar)
    if manifest.format == "gguf":
        (out / "Modelfile").write_text(_modelfile(out / "model.gguf", manifest))
    (out / "README.md").write_text(model_card(manifest, grammar=bool(grammar)))
    files = {path.relative_to(out).as_posix(): file_digest(path) for path in sorted(out.rglob("*")) if path.is_file()}
    body = {**asdict(manifest), "files": files}
    for name in ("draft", "kv_cache"):
        if not body[name]:
            del body[name]
    (out / "manifest.json").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def _modelfile(gguf: Path, manifest: Manifest) -> str:
    """Write an Ollama Modelfile: ChatML or our plain template in Ollama's template language, greedy decoding, the context that
    was promised.
    """
    from edgedistill.chat_template import plain_template
    from edgedistill.formats.gguf.read import read_info

    info = read_info(gguf)
    template = info.chat_template or ""
    bos, eos = info.special_token("bos"), info.special_token("eos")
    lines = ["FROM ./model.gguf"]
    if "<|im_start|>" in template:
        lines += [
            'TEMPLATE """{{- range .Messages }}<|im_start|>{{ .Role }}',
            "{{ .Content }}<|im_end|>",
            "{{ end }}<|im_start|>assistant",
            '"""',
            "PARAMETER stop <|im_end|>",
        ]
    elif template and template in (plain_template(eos), plain_template(eos, bos)):
        lines += [
            'TEMPLATE """{{- range .Messages }}{{ if eq .Role "system" }}{{ .Content }}',
            "",
            '{{ else if eq .Role "user" }}### User:',
            "{{ .Content }}",
            "",
            '{{ else if eq .Role "tool" }}### Tool:',
            "{{ .Content }}",
            "",
            "{{ else }}### Assistant:",
            f"{{{{ .Content }}}}{eos}",
            "",
            "{{ end }}{{ end }}### Assistant:",
            '"""',
            f"PARAMETER stop {json.dumps(eos, ensure_ascii=False)}",
        ]
    lines += [f"PARAMETER num_ctx {manifest.generation['context']}", "PARAMETER temperature 0"]
    system = [message["content"] for message in manifest.example if message["role"] == "system"]
    if system:
        lines.append(f'SYSTEM """{system[0]}"""')
    return "\n".join(lines) + "\n"


def commands(manifest: Manifest) -> list[str]:
    """Return the command lines that run this package, from inside its folder."""
    if manifest.format == "gguf":
        cache = arguments(manifest.kv)
        grammar = " --grammar-file grammar.gbnf" if "grammar.gbnf" in manifest.files else ""
        program = (
            f'from llama_cpp import Llama; print(Llama("model.gguf", '
            f"n_ctx={manifest.generation['context']}{_options(manifest.kv)}).create_chat_completion("
            f"messages={manifest.example!r}, temperature=0))"
        )
        drafted = []
        if manifest.draft and not manifest.draft["refused"]:
            drafted = [
                f"llama-server -m model.gguf -md draft.gguf --spec-type draft-simple "
                f"--spec-draft-n-max {manifest.draft['tokens']} --spec-draft-p-min {manifest.draft['min_probability']:g} "
                f"--jinja -c {manifest.generation['context']}{cache}  # with the draft"
            ]
        return [
            *drafted,
            f"llama-cli -m model.gguf --jinja --temp 0 -n {manifest.generation['max_new_tokens']}{grammar}{cache} "
            f"{_asked(manifest)}",
            f"llama-server -m model.gguf --jinja -c {manifest.generation['context']}{cache}",
            *_ollama(manifest.kv),
            f"python -c {shlex.quote(program)}",
        ]
    return ["pip install onnxruntime-genai", f"python -c {shlex.quote(_onnx_program(manifest))}"]


def _asked(manifest: Manifest) -> str:
    """Return what llama-cli is asked, and that it ends then. Without the example's own system message a template may put one of
    its own (SmolLM2's does): that is another prompt than the model was taught.
    """
    system, user = (
        next((str(m["content"]) for m in manifest.example if m["role"] == role), "") for role in ("system", "user")
    )
    told = f"-sys {shlex.quote(system)} " if system else ""
    plain = "--no-escape " if "\\" in user else ""  # else llama-cli makes a line break of \n
    return f"-st {plain}{told}-p {shlex.quote(user or 'Hello')}"


def _onnx_program(manifest: Manifest) -> str:
    """Return a program in one line that answers the example with the ONNX model, greedily."""
    made, asked = manifest.generation, json.dumps(manifest.example, ensure_ascii=False)
    return "; ".join(
        (
            "import onnxruntime_genai as og",
            "model = og.Model('onnx')",
            "tokenizer = og.Tokenizer(model)",
            f"text = tokenizer.apply_chat_template({asked!r}, add_generation_prompt=True)",
            "tokens = tokenizer.encode(text)",
            "params = og.GeneratorParams(model)",
            f"room = min({made['context']}, len(tokens) + {made['max_new_tokens']})",
            "params.set_search_options(max_length=room, do_sample=False, num_beams=1, repetition_penalty=1.0)",
            "generator = og.Generator(model, params)",
            "generator.append_tokens(tokens)",
            "[generator.generate_next_token() for _ in iter(generator.is_done, True)]",
            "print(tokenizer.decode(generator.get_sequence(0)[len(tokens):]))",
        )
    )


def _ollama(kv: Pair) -> list[str]:
    """Return how Ollama makes and runs the model. Its KV cache is set for all models of a server, keys and values alike."""
    run = "ollama create my-model -f Modelfile && ollama run my-model"
    if kv == F16:
        return [run]
    if kv[0] != kv[1] or kv[0] not in OLLAMA:
        return [f"{run}  # with an f16 KV cache: Ollama has no {told(kv)}"]
    return [f"OLLAMA_FLASH_ATTENTION=1 OLLAMA_KV_CACHE_TYPE={kv[0]} ollama serve  # then, beside it:", run]


def _options(kv: Pair) -> str:
    """Return what llama-cpp-python's ``Llama`` is told of a KV cache that is not f16."""
    if kv == F16:
        return ""
    return f", type_k={ggml_number(kv[0])}, type_v={ggml_number(kv[1])}" + (
        ", flash_attn=True" if needs_flash_attention(kv) else ""
    )


def model_card(manifest: Manifest, *, grammar: bool) -> str:
    """Write the model card: what it is, what it scored, how fast it ran and where, where its weights come from."""
    from edgedistill.evals.statistics import perplexity_over

    name = f"{manifest.recipe} for {manifest.target['name']}"
    lines = [
        f"# {name}",
        "",
        f"{manifest.target['summary']}. Built and measured by edgedistill {manifest.edgedistill}.",
        "",
    ]
    lines += ["## Task", "", "| suite | score | 95 % interval | n | teacher |", "|---|---|---|---|---|"]
    for suite, facts in manifest.evaluation.get("suites", {}).items():
        teacher = manifest.teacher.get("suites", {}).get(suite, {})
        if "perplexity" in facts:
            value = perplexity_over(facts["perplexity"], teacher.get("perplexity"))
            known = teacher.get("perplexity", {}).get("value")
            lines.append(
                f"| {suite} (perplexity) | {value['value']:.2f} | {value['low']:.2f} to {value['high']:.2f} "
                f"| {value['n']} | "
                f"{f'{known:.2f}' if known else ''} |"
            )
            continue
        score = facts["score"]
        known = teacher.get("score", {}).get("value")
        lines.append(
            f"| {suite} | {score['value']:.3f} | {score['low']:.3f} to {score['high']:.3f} | {score['n']} | "
            f"{f'{known:.3f}' if known is not None else ''} |"
        )
    lines += ["", "## Speed and size", "", f"- file: {manifest.size / 1e6:.1f} MB", *_speed_lines(manifest.measurement)]
    if manifest.kv_cache:
        lines += ["", "## KV cache", "", *kv_lines(manifest.kv_cache)]
    if manifest.draft:
        lines += ["", "## Draft", "", *_draft_lines(manifest.draft)]
    lines += ["", "## Gates", "", "| gate | wanted | found | status |", "|---|---|---|---|"]
    for line in manifest.gates:
        sign = "at least" if line["at_least"] else "at most"
        found = "not measured" if line["found"] is None else f"{line['found']:.4g}"
        lines.append(f"| {line['name']} | {sign} {line['bound']:.4g} | {found} | {line['status']} |")
    lines += ["", "## Weights", ""]
    lines += [*_source_lines(manifest.sources), "", "The licence of the source covers these derived weights too."]
    lines += ["", "## Run it", "", "```sh"]
    lines += [*commands(Manifest(**{**asdict(manifest), "files": {"grammar.gbnf": ""} if grammar else {}})), "```", ""]
    return "\n".join(lines)


def _speed_lines(facts: dict[str, Any]) -> list[str]:
    """Say how fast it ran, with 95 % intervals, where, by which build, and whether the machine was quiet."""
    if not (found := facts.get("measurement")):
        return []
    ratios, settings, host = facts.get("ratio", {}), found["settings"], found["host"]
    lines = []
    for key, label in (("pp", "prompt processing (pp512)"), ("tg", "generation (tg128)")):
        low, high = found[key]["interval"]
        lines.append(
            f"- {label}: {found[key]['median']:.1f} [{low:.1f}, {high:.1f}] tokens/s, median of n = {found[key]['n']}"
        )
    if ratio := ratios.get("tg"):
        lines.append(
            f"- decode against the teacher's f16: {ratio['value']:.2f}x "
            f"[{ratio['low']:.2f}, {ratio['high']:.2f}], n = {ratio['n']}"
        )
    for key, label in (("ttft_ms", "time to first token"), ("request_ms", "a whole request")):
        if one := found.get(key):
            lines.append(
                f"- {label}, P50 / P95 / P99: {one['p50']:.0f} / {one['p95']:.0f} / {one['p99']:.0f} ms, n = {one['n']}"
            )
    lines += [
        f"- peak memory of the process: {format_size(found['peak_rss'])}, with a context of {settings['context']} tokens",
        f"- measured on: {host.get('cpu', '')} ({host.get('arch', '')}), {settings['threads']} threads; "
        f"{told_runner(found['runner'])}; "
        + told_load(found.get("load_before"), found.get("load_after"), found.get("load_of_others")),
    ]
    if noise := dict.fromkeys([*found.get("noise", ()), *ratios.get("noise", ())]):
        lines.append(f"- **noisy**: do not rely on these speeds: {'; '.join(noise)}")
    return lines


def _source_lines(sources: list[dict[str, Any]]) -> list[str]:
    """Say what the weights are derived from, what else had a say in the text that they learnt, and where that is from."""
    what = {"judge": "answers judged by", "filter": "answers filtered by", "data": "rows of"}
    # A teacher that is the student's model, too, is told once.
    told = {(what.get(one["role"], "derived from"), one["source"]): one for one in sources}
    lines = []
    for (did, name), one in told.items():
        licence = f", licence {one['licence'] or 'unknown'}" if "licence" in one else ""
        origin = f", dequantized from {one['quantized_from']}" if one.get("quantized_from") else ""
        lines.append(f"- {did} `{name}` revision {one['revision']} (sha256 {one['digest'][:16]}…){licence}{origin}")
    return lines


def kv_lines(found: dict[str, Any]) -> list[str]:
    """Say which types the KV cache has, and what they cost at the context that was promised."""
    kv = found["k"], found["v"]
    memory = [f"{format_size(size)} in {name}" for name, size in found["peak_rss"].items()]
    lines = [f"- in {told(kv)}; peak memory of the process with that context: {', '.join(memory)}"]
    if kld := found.get("kld"):
        top1 = found["top1"]
        again = "; the text was repeated to fill it" if found["text"] < found["context"] * found["rows"] else ""
        lines.append(
            f"- at the end of {found['context']} tokens: KLD {kld['value']:.3g} [{kld['low']:.3g}, {kld['high']:.3g}] nats a token "
            f"from an f16 cache, first choices agree {top1['value']:.1%} [{top1['low']:.1%}, {top1['high']:.1%}] "
            f"(n = {found['rows']} rows, {found['tokens']} tokens{again})"
        )
        lines.append(
            f"- f16 without flash attention is {found['rounding']['value']:.3g} nats a token from f16 with it: rounding alone"
        )
    return lines


def _draft_lines(draft: dict[str, Any]) -> list[str]:
    """Say what the draft model brings, or why it is not in the package."""
    found = draft["drafting"]
    kept, check = found["acceptance"], found["tokens_per_check"]
    lines = [
        f"- up to {draft['tokens']} tokens are drafted: {kept['value']:.3f} [{kept['low']:.3f}, {kept['high']:.3f}] of them kept "
        f"(n = {kept['n']} tokens), {check['value']:.2f} [{check['low']:.2f}, {check['high']:.2f}] tokens a check"
    ]
    for name, label in (("answer", "whole answers"), ("decode", "generation")):
        ratio = found[name]
        bounds = f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append(f"- {label}: {bounds} as fast as without, n = {ratio['n']} prompts")
    if found["noise"]:
        lines.append(f"- **noisy**: do not rely on these speeds: {'; '.join(found['noise'])}")
    if draft["unproved"]:
        lines.append(f"- speeds are unproved for the target: {draft['unproved']}")
    if draft["refused"]:
        return [f"None is in this package: {draft['refused']}.", "", *lines]
    return [
        f"`draft.gguf` ({draft['size'] / 1e6:.1f} MB) writes ahead of the model, which checks it: the answers stay the same. "
        f"Measured with {found['runner'].get('version', 'llama.cpp')}; memory of both: {found['peak_rss'] / 1e6:.0f} MB.",
        "",
        *lines,
    ]
