"""What can be refused of teachers before anything runs: servers that cannot do what is asked, and teachers that have no prompts."""

from __future__ import annotations

from edgedistill.chat import read_chat
from edgedistill.errors import RecipeError, UsageError
from edgedistill.inputs import Inputs
from edgedistill.pairing import tokens_differ


def refuse_backend(inputs: Inputs) -> None:
    """Refuse what the server of the teacher cannot do, and a teacher for llama.cpp that is no GGUF file."""
    from edgedistill.teachers.vllm import find_python

    server, recipe = inputs.server, inputs.recipe
    if recipe.teacher.backend == "llama_cpp" and not inputs.teacher.path.is_file():
        raise RecipeError(
            f"{inputs.teacher.path} is no GGUF file", "leave backend out", key="teacher.backend", file=inputs.path
        )
    if server is None:
        return
    if server.launch is not None and find_python() is None:
        raise RecipeError(
            "vLLM is not installed", "edgedistill doctor --install vllm", key="teacher.vllm", file=inputs.path
        )
    told: tuple[str, str, str] | None = None
    by = [at for at, one in enumerate(recipe.filter) if one.kind == "best" and one.by == "likelihood"]
    if recipe.score.kind == "top-k" and not server.abilities.scores:
        told = (
            f"{server.url} gives no log-probabilities of given tokens, or fewer than {recipe.score.n} at each",
            "serve the teacher by vLLM (--max-logprobs), or distil on its text: score.kind = 'none', distill.loss.kd = 0",
            "score.kind",
        )
    elif by and not server.abilities.logprobs:
        told = (
            f"{server.url} gives no log-probabilities of what it writes",
            'choose by = "shortest" or "drawn"',
            f"filter.{by[0]}.by",
        )
    elif recipe.teacher.vllm is not None and not recipe.teacher.vllm.calls and any(row.tools for row in inputs.prompts):
        told = (
            "rows have tools, and vLLM reads no calls unless it is told how the model writes them",
            'set it: ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"], or describe the functions in the system '
            "message",
            "teacher.vllm.args",
        )
    else:
        told = _refuse_calls(inputs)
    if told is not None:
        raise RecipeError(told[0], told[1], key=told[2], file=inputs.path)


def refuse_others(inputs: Inputs) -> None:
    """Refuse teachers beside the first one that cannot be asked here, or have no prompts."""
    from edgedistill.teachers.vllm import find_python

    recipe = inputs.recipe
    every = {tag for row in inputs.prompts for tag in row.tags}
    able = 0
    for at, (one, model) in enumerate(zip(recipe.teachers, inputs.others, strict=True)):
        told, server = ("", "", ""), model.server
        if one.backend == "llama_cpp" and not model.path.is_file():
            told = (f"{model.path} is no GGUF file", "leave backend out", "backend")
        elif server is not None and server.launch is not None and find_python() is None:
            told = ("vLLM is not installed", "edgedistill doctor --install vllm", "vllm")
        elif server is not None and any(row.tools for row in inputs.prompts):
            told = (
                "rows have tools, and of servers only the first teacher's calls are read",
                "leave this teacher out",
                "server",
            )
        elif one.role == "routed" and not set(one.tags) & every:
            known = ", ".join(sorted(every)[:8]) or "none"
            told = (f"no prompt has a tag of {', '.join(one.tags)}", f"tags of the prompts: {known}", "tags")
        if told[0]:
            raise RecipeError(told[0], told[1], key=f"teachers.{at}.{told[2]}", file=inputs.path)
        here = one.backend == "transformers" and server is None
        able += one.role == "ensemble" and here and not tokens_differ(model, inputs.student, inputs.prompts)
    if recipe.score.combine and not (able and recipe.teacher.backend == "transformers" and inputs.server is None):
        raise RecipeError(
            "distributions are mixed of teachers whose weights are here, in the student's tokens: these are "
            f"{able} of the ensemble's, and the first one's backend is {recipe.teacher.backend!r}",
            "leave score.combine out: each text is then scored by who wrote it, or by the first teacher",
            key="score.combine",
            file=inputs.path,
        )
    if recipe.score.combine and recipe.score.kind in ("none", "dense"):
        raise RecipeError(
            f'score.kind = "{recipe.score.kind}" stores no distributions to mix',
            'set score.kind = "sampled"',
            key="score.combine",
            file=inputs.path,
        )


def _refuse_calls(inputs: Inputs) -> tuple[str, str, str] | None:
    """Tell (what, remedy, key) where a conversation is none that a server takes, or its calls would become no text."""
    from edgedistill.teachers.calls import check_rows

    files = {"prompts": inputs.prompts, **{f"suites.{name}": rows for name, rows in inputs.suites.items()}}
    for name, rows in files.items():
        some = [row for row in rows if row.tools or any(message["role"] == "tool" for message in row.messages)]
        try:
            if some:
                check_rows(some, read_chat(inputs.teacher).render)
        except UsageError as error:
            return error.message, error.hint, f"{name}.files"
    return None
