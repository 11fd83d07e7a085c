"""Who teaches: the recipe's table of the teacher, and what a teacher without weights here rules out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from edgedistill.recipe_base import Count, Given, Positive, Section, Share
from edgedistill.toml_source import key_error

if TYPE_CHECKING:
    from edgedistill.recipe import Recipe

SERVED = "openai:"
"""Before the name of a model that stands behind a server."""
OWN_BODY = ("model", "messages", "max_tokens", "temperature", "top_p", "seed", "n", "stream", "logprobs")
"""What a request for an answer holds anyway."""
WRITERS = ("teacher", "student", "gold", "hedge", "review", "smoothing")
"""What kept rows call those who wrote them, beside the names of ``[[teachers]]``."""
MOST_SCORED = 100
"""Best tokens of a position that it is sensible to ask a server for; vLLM gives 20 unless it is told otherwise."""


class Budget(Section):
    """What the recipe may spend on its teacher in all builds together, on one store. A request that might go beyond is not sent."""

    tokens: Count | None = Field(default=None, description="tokens of prompts and answers")
    money: Positive | None = Field(default=None, description="in the currency of teacher.price")


class Price(Section):
    """What a million tokens cost: of what is asked, and of what is answered."""

    input: Annotated[float, Field(ge=0)]
    output: Annotated[float, Field(ge=0)]
    batch: Share = Field(default=1.0, description="the share of it that requests in a batch cost: OpenAI's is 0.5")


class Rate(Section):
    """What may be sent to all servers in a minute, spread evenly."""

    requests: Count | None = None
    tokens: Count | None = Field(default=None, description="of prompts (4 bytes each) and the longest answers")


class Batch(Section):
    """Answers are asked for in files of many requests, which the server works off when it has time (OpenAI's Batch API): within a
    day, and at a lower price. A build that is stopped leaves its batches running, and the next one waits for them. What proves
    the teacher is asked at once, and so is what a batch failed at.
    """

    requests: Annotated[int, Field(ge=1, le=50_000)] = Field(
        default=50_000, description="most requests of a batch; fewer where the server queues no more tokens at a time"
    )
    window: str = Field(default="24h", description="by when it has to be done; OpenAI takes no other")
    poll: Positive = Field(default=30.0, description="seconds between two looks at how far it is")


class Vllm(Section):
    """How a build starts vLLM on a teacher whose weights are here, for each step that asks it
    (``edgedistill doctor --install vllm`` makes it an environment).
    """

    tensor_parallel: Count = Field(default=1, description="GPUs that share one copy of the model")
    servers: Count = Field(default=1, description="copies, each a server with GPUs of its own")
    context: Count | None = Field(default=None, description="tokens of prompt and answer; the model's when left out")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    args: tuple[str, ...] = Field(default=(), description='further arguments: ["--gpu-memory-utilization", "0.8"]')
    start_timeout: Positive = Field(default=1800.0, description="seconds to wait until it answers")

    @property
    def calls(self) -> bool:
        """Tell whether its arguments make it read calls of tools."""
        given = {word.partition("=")[0] for word in self.args}
        return {"--enable-auto-tool-choice", "--tool-call-parser"} <= given


class Asked(Section):
    """A model that is asked. With ``backend`` "openai" it stands behind a server that speaks as OpenAI's does (vLLM, SGLang,
    llama-server, Ollama, hosted ones): ``model`` is "openai:" and the name that it is served by, ``server`` the address. With
    "llama_cpp" a GGUF file answers as it is, in its own type, by llama.cpp; with "transformers" such a file is brought to full
    precision first. With ``vllm`` the build starts vLLM on weights that are here.
    """

    OF_ANY_SERVER: ClassVar[tuple[str, ...]] = ("body", "concurrency", "timeout", "retries")

    OF_SERVER: ClassVar[tuple[str, ...]] = (
        "server",
        "revision",
        "key_env",
        *OF_ANY_SERVER,
        "rate",
        "price",
        "budget",
        "batch",
    )

    model: str
    backend: Literal["transformers", "llama_cpp", "openai"] = "transformers"
    server: str | list[str] | None = Field(
        default=None,
        description="address up to its /v1: http://127.0.0.1:8000/v1; of several servers of the model, all of theirs",
    )
    revision: str = Field(
        default="", description="a label of yours, never sent: with another one the same name is asked anew"
    )
    key_env: str = Field(
        default="OPENAI_API_KEY", description="the environment variable that holds the server's key, where it wants one"
    )
    body: dict[str, Any] = Field(
        default={},
        description="what each request for an answer says, too: { chat_template_kwargs = { enable_thinking = false } }",
    )
    concurrency: Count = Field(default=16, description="requests at a time, to each server")
    timeout: Positive = Field(default=300.0, description="seconds to wait for an answer")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=8, description="times that a request is put again when the server is busy, broken or gone"
    )

    vllm: Vllm | None = None
    rate: Rate = Rate()
    price: Price | None = None
    budget: Budget = Budget()
    batch: Batch | None = None

    @property
    def servers(self) -> list[str]:
        """Return the addresses."""
        return [self.server] if isinstance(self.server, str) else self.server or []

    @field_validator("server")
    @classmethod
    def _address(cls, server: str | list[str] | None) -> str | list[str] | None:
        urls = [server] if isinstance(server, str) else server
        if urls is not None and (not urls or len(set(urls)) < len(urls)):
            raise ValueError("name each server once" if urls else "name a server")
        for url in urls or ():
            check_url(url)
        return server

    @model_validator(mode="after")
    def _served(self) -> Asked:
        if self.vllm is not None and self.backend != "transformers":
            raise key_error("vllm", "this starts vLLM on weights that are here: leave backend out")
        if (self.backend == "openai" or self.vllm) and (taken := sorted(set(self.body) & set(OWN_BODY))):
            raise key_error("body", f"{taken[0]} is set by [generate] and [teacher]")
        if self.backend == "openai":
            if not self.model.startswith(SERVED) or self.model == SERVED:
                raise key_error(
                    "model", f'a served teacher is named "{SERVED}" and the name that the server knows it by'
                )
            if self.server is None:
                raise key_error("server", "where is it? http://127.0.0.1:8000/v1, or https://api.openai.com/v1")
            if self.budget.money is not None and self.price is None:
                raise key_error(
                    "budget.money", "what do a million tokens cost? teacher.price = { input = …, output = … }"
                )
            if self.batch is not None and len(self.servers) > 1:
                raise key_error("batch", "a batch goes to one server: name one in teacher.server")
            return self
        if self.model.startswith(SERVED):
            raise key_error("model", 'this names a served teacher: set backend = "openai"')
        if self.backend == "llama_cpp" and not self.model.startswith(("gguf:", "pypi:")):
            raise key_error("model", "llama.cpp reads GGUF files: name one (gguf:FILE), or leave backend out")
        allowed = self.OF_ANY_SERVER if self.vllm else ()
        given = [name for name in self.OF_SERVER if name in self.model_fields_set and name not in allowed]
        if given:
            raise key_error(given[0], 'this is for backend = "openai", and the weights of this teacher are here')
        return self


class Teacher(Asked):
    """The model that is proved to do the task. Under ``min_score`` (suite -> score) nothing is generated. What answers, is proved
    and gives distributions is a model's weights, a GGUF file that llama.cpp runs (``backend`` "llama_cpp"), a server that speaks as
    OpenAI's does ("openai"), or vLLM, which the build starts (``vllm``): it gives the best tokens.
    """

    min_score: dict[str, Share] = Field(default={})
    chat_template: Given = None

    @model_validator(mode="after")
    def _shown(self) -> Teacher:
        if self.chat_template is not None and self.backend != "transformers":
            whose = "server's" if self.backend == "openai" else "GGUF file's"
            raise key_error("chat_template", f"this teacher is asked under its {whose} own template: leave the key out")
        if self.chat_template == "teacher":
            raise key_error("chat_template", 'this is the teacher: write "chatml", "plain", or a Jinja file')
        return self


class Judge(Asked):
    """Who judges answers for ``[[filter]] kind = "judge"``; without this table the teacher does. A server, weights or a GGUF file,
    as a teacher is; ``budget`` and ``price`` are its own, but where it is the teacher's model on the teacher's server both are put
    down to one account, and say the same of it.
    """


class Another(Teacher):
    """A teacher beside ``[teacher]``. ``recovery`` answers from scratch what the teachers before it failed, judged by the
    same filters; ``routed`` answers the prompts that have one of its ``tags``, in the first one's place; ``ensemble`` answers what
    the first one answers, and distributions may be mixed (``score.combine``). Kept rows say who wrote them. What it wrote is scored
    by itself where its weights are here and its tokens are the student's, else by the first teacher.
    """

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$", description="what its rows and steps are called by")]
    role: Literal["recovery", "routed", "ensemble"]
    tags: tuple[str, ...] = Field(default=(), description="routed: prompts with one of these are this teacher's")

    @model_validator(mode="after")
    def _in_its_role(self) -> Another:
        if (self.role == "routed") != bool(self.tags):
            raise key_error("tags", 'tags say which prompts are sent to a teacher with role = "routed": set both')
        if self.name in WRITERS or self.name in ("analyses", "pilot") or self.name.startswith("round-"):
            raise key_error("name", f"{self.name!r} is what other rows or steps are called: take another name")
        return self


def every_asked(recipe: Recipe) -> list[Asked]:
    """Return the tables of all models that are asked: the teachers, the first one first, and the judge."""
    return [recipe.teacher, *recipe.teachers, *([recipe.judge] if recipe.judge is not None else [])]


def refuse_several(recipe: Recipe) -> None:
    """Refuse teachers beside the first one that have nothing to do, or that a recipe's other tables rule out."""
    if recipe.score.combine is not None and not any(one.role == "ensemble" for one in recipe.teachers):
        raise key_error("score.combine", 'there is nothing to combine: add [[teachers]] role = "ensemble"')
    names = [one.name for one in recipe.teachers]
    for at, one in enumerate(recipe.teachers):
        wrong: dict[str, str | bool] = {
            "name": names.index(one.name) < at and f"two teachers are named {one.name!r}",
            "role": one.role == "recovery"
            and not recipe.filter
            and "nothing tells which answers failed: add [[filter]]",
            "backend": recipe.generate.json_schema is not None
            and one.backend == "transformers"
            and one.vllm is None
            and "it writes freely, and generate.json_schema is set: take vLLM or llama.cpp",
        }
        for key, why in wrong.items():
            if why:
                raise key_error(f"teachers.{at}.{key}", str(why))
    if not recipe.teachers:
        return
    if recipe.generate.style == "tool-trace":
        raise key_error("teachers", "the turns of a trace are one teacher's: leave [[teachers]] out")
    if any(one.analysis for one in recipe.filter):
        raise key_error(
            "teachers", "a teacher is told of its own mistakes: set filter.analysis to false, or leave [[teachers]] out"
        )


def refuse_accounts(recipe: Recipe) -> None:
    """Refuse two tables of one model on one server, whose spending is one account, where they do not agree on price and budget: a
    bound that one of them keeps would be spent by the other.
    """
    tables = every_asked(recipe)
    keys = ["teacher", *(f"teachers.{at}" for at in range(len(recipe.teachers))), "judge"]
    for at, one in enumerate(tables):
        for name, other in zip(keys, tables[:at], strict=False):
            if other.model != one.model or set(other.servers) != set(one.servers):
                continue
            for key in ("price", "budget"):
                if getattr(one, key) != getattr(other, key):
                    raise key_error(
                        f"{keys[at]}.{key}",
                        f"{one.model} on this server is [{name}], too, and both are put down to one account: give both the same "
                        f"{key}",
                    )


def refuse_backend(recipe: Recipe) -> None:
    """Refuse what needs the weights of the teacher in full precision, where they are behind a server or in a GGUF file."""
    if recipe.generate.json_schema is not None and "response_format" in recipe.teacher.body:
        raise key_error("teacher.body", "generate.json_schema sets response_format")
    if recipe.teacher.vllm is not None:
        _refuse_vllm(recipe)
    elif recipe.teacher.backend == "transformers" and recipe.generate.json_schema is not None:
        raise key_error(
            "generate.json_schema",
            "transformers writes freely: run the teacher by vLLM (teacher.vllm = {}) or llama.cpp, or filter its answers "
            '([[filter]] kind = "format")',
        )
    if recipe.teacher.backend == "transformers":
        return
    served = recipe.teacher.backend == "openai"
    features = recipe.distill.features
    wrong = {
        "adapt": recipe.adapt is not None and "it cannot be trained: leave [adapt] out",
        "student.model": recipe.student.model == "teacher"
        and "no student can be cut out of it: name a model whose weights are here",
        "heal.hidden": bool(recipe.heal and recipe.heal.hidden) and "it shows no hidden states: set it to 0",
        "distill.features": bool(features and features.on) and "it shows no hidden states: leave the table out",
        "baselines.quantized_teacher": recipe.baselines.quantized_teacher is not None
        and "it is not quantized once more: leave the key out",
        "generate.style": not served
        and recipe.generate.style == "tool-trace"
        and "its calls are not read yet: take another",
        **(_only_served(recipe) if served else {}),
    }
    if not served:
        wrong["score.kind"] = recipe.score.kind == "dense" and (
            'it does not run beside the student, where its whole distributions would go: take "sampled" ones'
        )
        wrong["distill.on_policy"] = recipe.distill.on_policy > 0 and "it does not run beside the student: set it to 0"
    for key, why in wrong.items():
        if why:
            where = "stands behind a server" if served else "is a GGUF file that llama.cpp runs"
            raise key_error(key, f"the teacher {where}: {why}")


def _only_served(recipe: Recipe) -> dict[str, str | bool]:
    loss = recipe.distill.loss
    return {
        "score.kind": recipe.score.kind not in ("top-k", "none")
        and 'a server gives the best tokens and no more: set "top-k" (vLLM; the student\'s tokenizer), or "none" and '
        "distill.loss.kd = 0",
        "score.n": recipe.score.kind == "top-k"
        and recipe.score.n > MOST_SCORED
        and "servers give a few best tokens: 20 is usual",
        "distill.loss.temperature": loss.kd > 0
        and loss.temperature != 1.0
        and "of a server's distribution only the temperature 1 is known: set it to 1",
        "score.temperature": recipe.score.temperature not in (None, 1.0)
        and "of a server's distribution only the temperature 1 is known: leave it out",
        **_no_file(recipe),
    }


def _no_file(recipe: Recipe) -> dict[str, str | bool]:
    return {
        "gates.min_speedup": recipe.gates.min_speedup is not None
        and "there is no file of it to be faster than: leave the key out",
        "gates.min_shrink": recipe.gates.min_shrink is not None
        and "there is no file of it to be smaller than: leave the key out",
    }


def _refuse_vllm(recipe: Recipe) -> None:
    """Refuse what a teacher that vLLM runs is not made into: a GGUF file; and distributions that it would not give alike."""
    loss = recipe.distill.loss
    wrong = {
        "baselines.quantized_teacher": recipe.baselines.quantized_teacher is not None
        and "it is not quantized: leave the key out",
        "distill.loss.temperature": recipe.score.kind == "top-k"
        and loss.kd > 0
        and loss.temperature != 1.0
        and 'of its best tokens only those at temperature 1 are known: set it to 1, or score.kind to "sampled"',
        "score.temperature": recipe.score.kind == "top-k"
        and recipe.score.temperature not in (None, 1.0)
        and "of its best tokens only those at temperature 1 are known: leave it out",
        **_no_file(recipe),
    }
    for key, why in wrong.items():
        if why:
            raise key_error(key, f"the teacher is run by vLLM: {why}")


def check_url(url: str) -> str:
    """Return a server's address if it can be one. Raises ValueError."""
    parts = urlsplit(url)
    try:
        reachable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or none of those that there are
        reachable = False
    if not reachable:
        raise ValueError(f"{url!r} is no address of a server: write it as http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise ValueError("a key in an address ends up in logs: put it into the environment, and its name into key_env")
    return url
