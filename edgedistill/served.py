"""A teacher behind an OpenAI-compatible server, at plan time: where it is, how it may be asked, and what it can do.

No torch. What was found is kept in the store by address and name, so that a build whose steps are all cached needs no server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedistill.errors import UsageError
from edgedistill.fingerprint import canonical_json, digest
from edgedistill.model_facts import ModelFacts
from edgedistill.models import Resolved
from edgedistill.recipe import Recipe
from edgedistill.recipe_teacher import SERVED, Asked, every_asked
from edgedistill.rows import RowStore
from edgedistill.spending import Budget, Ledger, Use, most, used
from edgedistill.store import write_atomic

KIND = SERVED.removesuffix(":")
NAME = "teacher"
"""What a server is told to call a model that we start it on."""
SCORED = "prompt_logprobs"
"""vLLM's parameter for the log-probabilities of given text; the others' ``echo`` gives those of text that they cut themselves."""

FOR_GOOD = ("invalid", "authentication", "permission", "not_found", "quota", "billing", "content", "context")
"""In the type or the code of an error: another try would end the same, whatever else it says."""
SIGNS = {
    429: ("rate limit", "too many requests", "resource exhausted"),
    503: ("overloaded", "unavailable", "at capacity", "try again"),
    504: ("timeout", "time-out", "timed out", "deadline exceeded"),
    500: ("server error", "internal error", "api error"),
}
"""Words of errors, and the statuses that they stand for."""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a server can do. ``context`` 0: it does not say; ``logprobs``: of what it writes; ``scores``: the number of best tokens
    that it gives at each token of a given text, 0 where it gives none (or was not asked).
    """

    context: int = 0
    logprobs: bool = False
    scores: int = 0


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What may be sent in a minute: requests, and tokens of prompts and answers. None: no bound."""

    requests: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Batching:
    """How questions are put in batches: the most requests of one, by when it has to be done, seconds between two looks at it, and
    the share of the price that it costs.
    """

    requests: int
    window: str
    poll: float
    share: float


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How vLLM is started on weights that are here: on how many GPUs each server, how many servers, tokens of context (None: the
    model's), how many best tokens are asked for; ``start_timeout`` in seconds.
    """

    tensor_parallel: int
    servers: int
    context: int | None
    dtype: str
    args: tuple[str, ...]
    start_timeout: float
    scored: int = 0


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where a teacher is served and how hard it may be asked; of these only ``model``, ``revision`` and ``body`` tell one
    teacher from another.

    ``urls``, one or several servers of the same model, end before ``/chat/completions``; ``key_env`` names the environment
    variable with their key; ``body`` is added to each request for an answer; ``concurrency`` is each server's; ``timeout`` is in
    seconds. What is asked is put down to ``account``. With ``launch`` whoever asks starts vLLM, and there are no ``urls`` yet.
    """

    urls: tuple[str, ...]
    model: str
    revision: str = ""
    key_env: str
    body: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int
    timeout: float
    retries: int
    rate: Rate = Rate()
    account: str = ""
    budget: Budget = field(default_factory=Budget)
    launch: Launch | None = None
    batch: Batching | None = None
    abilities: Abilities = Abilities()

    @property
    def url(self) -> str:
        """Return the first server's address, for messages."""
        return self.urls[0] if self.urls else "vLLM"

    def ledger(self, rows: Path) -> Ledger:
        """Return the account of what is asked, in the file of the row store."""
        return Ledger(rows, self.account, self.budget)

    @property
    def batch_budget(self) -> Budget:
        """Return the budget at the price of batches."""
        share = self.batch.share if self.batch else 1.0
        return replace(self.budget, input=share * self.budget.input, output=share * self.budget.output)

    @property
    def identity(self) -> dict[str, Any]:
        """Return what its answers depend on: as far as anyone can tell from here, its name and what is always asked along."""
        return {"model": self.model, "body": dict(self.body), **({"revision": self.revision} if self.revision else {})}

    @property
    def manner(self) -> str:
        """Return what else the answers of weights that are here depend on: what is always asked along, the type that vLLM computes
        in where it is not the checkpoint's, and vLLM's own arguments; "" where that is nothing, or part of the identity.
        """
        if self.launch is None:
            return ""
        dtype = {} if self.launch.dtype == "auto" else {"dtype": self.launch.dtype}
        if not (self.body or self.launch.args or dtype):
            return ""
        return canonical_json({"body": dict(self.body), "args": list(self.launch.args), **dtype})

    def limit(self, tokens: int) -> dict[str, int]:
        """Return the bound of an answer's length, for a request; nothing where ``body`` has it by its newer name."""
        return {} if "max_completion_tokens" in self.body else {"max_tokens": tokens}

    @property
    def own(self) -> bool:
        """Tell whether this machine's own vLLM is asked: no key, no proxy."""
        return self.launch is not None

    def headers(self) -> dict[str, str]:
        """Return the headers of a request, with the key where there is one. Raises UsageError for what cannot be one."""
        key = self._key()
        if not (key.isascii() and key.isprintable()):
            raise UsageError(
                f"${self.key_env} holds what no key can: a line break inside, or letters beyond ASCII",
                f"export {self.key_env}=…",
            )
        return {"Authorization": f"Bearer {key}"} if key else {}

    def hide(self, text: str) -> str:
        """Return a text without the key, for messages."""
        key = self._key()
        return text.replace(key, "…") if key else text

    def _key(self) -> str:
        return (
            "" if self.own else os.environ.get(self.key_env, "").strip()
        )  # often read from a file, with its last line break


def server_of(recipe: Recipe, teacher: Asked) -> Server | None:
    """Return the server of one of the recipe's teachers, one that is started included; None where it needs none."""
    price = teacher.price
    if teacher.backend != "openai" and teacher.vllm is None:
        return None
    return Server(
        urls=tuple(url.rstrip("/") for url in teacher.servers),
        model=NAME if teacher.vllm else teacher.model.removeprefix(SERVED),
        launch=teacher.vllm and Launch(**teacher.vllm.model_dump(), scored=scored_tokens(recipe, teacher)),
        revision=teacher.revision,
        key_env=teacher.key_env,
        body=teacher.body,
        concurrency=teacher.concurrency,
        timeout=teacher.timeout,
        retries=teacher.retries,
        batch=teacher.batch and Batching(**teacher.batch.model_dump(), share=price.batch if price else 1.0),
        rate=Rate(requests=teacher.rate.requests, tokens=teacher.rate.tokens),
        account=account_of(recipe, teacher),
        budget=Budget(
            tokens=teacher.budget.tokens,
            money=teacher.budget.money,
            input=price.input if price else 0.0,
            output=price.output if price else 0.0,
        ),
    )


def account_of(recipe: Recipe, teacher: Asked) -> str:
    """Return what a model's spending is put down to: the recipe and the model, one account for all tables of a model on one server.
    Where two servers have a model of that name, the later table's is an account of its own, named by its address.
    """
    same = next(one for one in every_asked(recipe) if one.model == teacher.model)
    name = f"{recipe.name}: {teacher.model}"
    return name if set(same.servers) == set(teacher.servers) else f"{name} at {', '.join(sorted(teacher.servers))}"


def scored_tokens(recipe: Recipe, teacher: Asked) -> int:
    """Return how many best tokens of given text the recipe wants of a teacher's server: of the first teacher's only."""
    return recipe.score.n if recipe.score.kind == "top-k" and teacher is recipe.teacher else 0


def resolve_launched(server: Server, teacher: Resolved) -> Resolved:
    """Return a teacher whose weights are here with the server that will be started on them: what vLLM can do is known."""
    assert server.launch is not None
    context = server.launch.context or teacher.facts.context
    return replace(
        teacher,
        server=replace(server, abilities=Abilities(context=context, logprobs=True, scores=server.launch.scored)),
    )


def resolve_served(server: Server, student: Resolved, store: Path, *, scored: int) -> Resolved:
    """Return a served teacher as a model that has no weights here, with its server and what that can do; ``scored`` best tokens of
    given text are wanted.

    Its tokenizer is taken for the student's, which the steps that need it find out. Raises UsageError where the server does not
    answer, or not for this model.
    """
    found = [_abilities(replace(server, urls=(url,)), store, scored=scored) for url in server.urls]
    abilities = Abilities(
        context=min((one.context for one in found if one.context), default=0),
        logprobs=all(one.logprobs for one in found),
        scores=min(one.scores for one in found),
    )
    facts = ModelFacts(
        architecture="",
        layers=0,
        hidden=0,
        heads=1,
        kv_heads=1,
        ffn=0,
        vocab=0,
        tied=True,
        context=abilities.context,
        tokenizer=student.facts.tokenizer,
        quantized_from="",
        licence="not stated",
        size=0,
    )
    return Resolved(
        source=SERVED + server.model,
        kind=KIND,
        revision=server.revision or "served",
        digest=digest(server.identity),
        path=student.path,
        facts=facts,
        server=replace(server, abilities=abilities),
    )


def _abilities(server: Server, store: Path, *, scored: int) -> Abilities:
    """Return what one server can do, as it was found out once."""
    memo = store / "models" / "served" / f"{digest([server.url, server.identity, scored])}.json"
    if memo.is_file():
        return Abilities(**json.loads(memo.read_text()))
    bounded = server.budget.tokens is not None or server.budget.money is not None
    with closing(server.ledger(RowStore(store).path)) as ledger:
        found = probe(server, scored=scored, ledger=ledger if bounded else None)
    memo.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(memo, json.dumps(asdict(found)))
    return found


def probe(server: Server, *, scored: int, ledger: Ledger | None = None) -> Abilities:
    """Ask a server for its models and one token, and with ``scored`` for the best tokens along a given text; what that costs is
    put down in the ``ledger``. Raises UsageError.
    """
    import httpx2

    with httpx2.Client(headers=server.headers(), timeout=server.timeout) as client:

        def post(path: str, body: Mapping[str, Any]) -> httpx2.Response:
            asked = {"model": server.model, **body}
            if ledger is None:
                return client.post(server.url + path, json=asked)
            if not ledger.reserve(need := most(asked)):
                raise UsageError(ledger.over(need), "raise teacher.budget: a server is asked what it can do")
            try:
                response = client.post(server.url + path, json=asked)
            except httpx2.ConnectError:  # of any other, nobody knows what it cost
                ledger.settle(need, Use(0, 0))
                raise
            if response.status_code == 200:
                with suppress(ValueError):
                    ledger.settle(need, used(response.json()) or need)
            else:
                ledger.settle(need, Use(0, 0))
            return response

        try:
            context = _listed(client.get(f"{server.url}/models"), server)
            asked = {"messages": [{"role": "user", "content": "Hi"}], **server.limit(1), **server.body}
            answer = post("/chat/completions", {**asked, "logprobs": True})
            if answer.status_code in (400, 422):  # some models take no logprobs
                answer = post("/chat/completions", asked)
            if answer.status_code != 200:
                raise UsageError(f"{server.url}: {refusal(server, answer)}", _remedy(server, answer.status_code))
            if error_in(answer.json()) is not None:
                raise UsageError(f"{server.url}: {refusal(server, answer)}", "see to the server, or mend [teacher]")
            logprobs = bool(answer.json()["choices"][0].get("logprobs"))
            scores = 0
            if scored:
                given = post("/completions", {"prompt": "The sky is", "max_tokens": 1, SCORED: scored})
                if given.status_code == 200 and given.json()["choices"][0].get(SCORED):
                    scores = scored
        except httpx2.RequestError as error:
            raise UsageError(
                f"{server.url}: the teacher's server does not answer: {error or type(error).__name__}",
                "start it, or mend teacher.server",
            ) from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise UsageError(
                f"{server.url}: what answers there is no OpenAI-compatible server", "mend teacher.server (…/v1)"
            ) from None
    return Abilities(context=context, logprobs=logprobs, scores=scores)


def _listed(models: Any, server: Server) -> int:
    """Return the context of the model that the server lists, 0 where it does not say; raises UsageError where it has others."""
    if models.status_code in (401, 403):
        raise UsageError(f"{server.url}: {refusal(server, models)}", _remedy(server, models.status_code))
    listed = models.json().get("data", []) if models.status_code == 200 else []
    names = [one["id"] for one in listed]
    if names and server.model not in names:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        raise UsageError(f"{server.url} serves no {server.model!r}", f"it has {shown}: mend teacher.model")
    own = next((one for one in listed if one["id"] == server.model), {})
    return int(own.get("max_model_len") or (own.get("meta") or {}).get("n_ctx") or 0)  # vLLM, llama.cpp


def _remedy(server: Server, status: int) -> str:
    if status in (401, 403):
        return f"export {server.key_env}=…, or name another variable in teacher.key_env"
    if status == 404:
        return "teacher.server ends in /v1 with most servers; teacher.model is the name that it serves"
    return "mend [teacher]"


def refusal(server: Server, response: Any) -> str:
    """Return what a server says of a request that it refuses, in one line and without the key."""
    try:
        text = said(response.json())
    except ValueError:
        text = response.text
    text = " ".join(server.hide(text).split())
    return f"the server refuses ({response.status_code}): {text[:300] or 'it says nothing'}"


def said(told: Any) -> str:
    """Return the words of an error, or of a reply that is one."""
    error = (error_in(told) or told.get("error", told)) if isinstance(told, dict) else told
    return str(error.get("message", error) if isinstance(error, dict) else error)


def error_in(reply: Mapping[str, Any]) -> Any:
    """Return the error that a reply holds in the place of an answer: some servers, and what stands between them and us, send it
    with the status of an answer. None where it holds none.
    """
    if reply.get("object") == "error":
        return reply
    choices = reply.get("choices")
    if isinstance(choices, list) and choices:
        return (choices[0].get("error") or None) if isinstance(choices[0], dict) else None
    return reply.get("error") or None


def status_of(error: Any) -> int:
    """Return the HTTP status that an error in a reply stands for: the one that it names, or that of its words; 400 where these say
    nothing of a server that may be asked again.
    """
    named = [error.get(key) for key in ("code", "status", "type")] if isinstance(error, dict) else []
    for one in named:
        if isinstance(one, int | str) and str(one).isdecimal() and 400 <= int(one) < 600:
            return int(one)
    words = " ".join(one for one in named if isinstance(one, str)).lower()
    if any(word in words for word in FOR_GOOD):
        return 400
    text = f"{words} {error.get('message') if isinstance(error, dict) else error}".lower().replace("_", " ")
    return next((status for status, signs in SIGNS.items() if any(sign in text for sign in signs)), 400)
