from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedistill.data.prompts import Row
from edgedistill.errors import UsageError
from edgedistill.families import check_trimmable
from edgedistill.training.data import Example
from edgedistill.training.divergences import FORWARD_KL
from edgedistill.training.draws import stored_temperatures
from edgedistill.training.hidden import HiddenStates
from edgedistill.training.losses import batch_targets, sparse_divergence
from edgedistill.training.packing import completion_states, make_batch, packed_mode
from edgedistill.training.recipe import load_model
from edgedistill.training.targets import tokenizer_hash
from edgedistill.training.vocabulary import (
    Origin,
    choose_tokens,
    origin_towards,
    read_origin,
    renumber,
    trim_vocabulary,
    write_trimmed_tokenizer,
)
from tests.unit.formats.gguf.conftest import TEXT, make_model, make_tokenizer
from tests.unit.training.tiny import VOCAB, make_examples, make_llama, score

TAUGHT = ["Remind me to water the ficus at 7:45.", '{"name":"add_note","arguments":{"text":"ficus"}}', "naïve café 🙂"]
CHAT = [{"role": "user", "content": TAUGHT[0]}, {"role": "assistant", "content": TAUGHT[1]}]


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def trimmed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Origin]:
    """The real tokenizer, the same with 2,000 of its 49,152 tokens, and the way back."""
    folder = tmp_path_factory.mktemp("trimmed")
    whole = tokenizer_of(smollm2)
    used = set(whole.apply_chat_template(CHAT, tokenize=True, return_dict=False))
    used |= {token for text in TAUGHT for token in whole.encode(text, add_special_tokens=False)}
    kept = choose_tokens(smollm2, used, 2000)
    assert len(kept) == len(set(kept.tolist())) == 2000
    write_trimmed_tokenizer(smollm2, folder, kept)
    origin = read_origin(folder)
    assert origin is not None
    assert origin.tokenizer == tokenizer_hash(whole)
    return whole, tokenizer_of(folder), origin


def test_taught_text_is_cut_as_before(trimmed: tuple[Any, Any, Origin]) -> None:
    whole, small, origin = trimmed
    for text in TAUGHT:
        found = small.encode(text, add_special_tokens=False)
        assert origin.kept[found].tolist() == whole.encode(text, add_special_tokens=False)
    ids = small.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert origin.kept[ids].tolist() == whole.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert small.all_special_tokens == whole.all_special_tokens
    assert origin.kept[small.eos_token_id] == whole.eos_token_id


@given(st.text(max_size=60))
@settings(max_examples=150)
def test_any_text_can_be_written_as_before(trimmed: tuple[Any, Any, Origin], text: str) -> None:
    whole, small, origin = trimmed
    ids = small.encode(text, add_special_tokens=False)
    before = whole.decode(whole.encode(text, add_special_tokens=False))  # it lacks bytes of rare planes
    assert small.decode(ids) == before
    # Each piece is a token of the whole tokenizer too: read by the teacher, it is the same text.
    assert whole.decode(origin.kept[ids].tolist()) == before


@given(
    st.lists(st.sampled_from("water the ficus alarm at 7 note naïve café 🙂 rhododendron Zzyzx".split()), max_size=9)
)
def test_text_of_kept_tokens_alone_is_cut_as_before(trimmed: tuple[Any, Any, Origin], words: list[str]) -> None:
    whole, small, origin = trimmed
    before = whole.encode(" ".join(words), add_special_tokens=False)
    if set(before) <= set(origin.kept.tolist()):
        assert origin.kept[small.encode(" ".join(words), add_special_tokens=False)].tolist() == before


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe", "qwen2"])
def test_every_family_keeps_its_way_to_cut(tmp_path: Path, pre: str) -> None:
    make_tokenizer(tmp_path / "whole", pre, bos=True)
    whole = tokenizer_of(tmp_path / "whole")
    texts = TEXT[:2]
    kept = choose_tokens(tmp_path / "whole", {t for x in texts for t in whole.encode(x, add_special_tokens=False)}, 330)
    (tmp_path / "small").mkdir()
    write_trimmed_tokenizer(tmp_path / "whole", tmp_path / "small", kept)
    small = tokenizer_of(tmp_path / "small")
    for text in texts:
        assert kept[small.encode(text)].tolist() == whole.encode(text)  # with the BOS that the post-processor adds
    assert small.decode(small.encode(TEXT[4]), skip_special_tokens=True) == TEXT[4]
    assert len(small.encode(TEXT[4])) > len(whole.encode(TEXT[4]))


def test_a_student_of_a_trimmed_link_has_its_teachers_numbers(smollm2: Path, tmp_path: Path) -> None:
    """The note of where a tokenizer was cut from is inherited with it, and is about another teacher then."""
    from edgedistill.training.recipe import copy_tokenizer

    link, student = tmp_path / "link", tmp_path / "student"
    link.mkdir()
    student.mkdir()
    write_trimmed_tokenizer(smollm2, link, choose_tokens(smollm2, set(), 2000))
    copy_tokenizer(link, student)
    assert origin_towards(link, smollm2) is not None
    assert read_origin(student) is not None
    assert origin_towards(student, link) is None


def test_merges_written_as_text_and_a_token_that_no_merge_makes(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    lone = data["model"]["vocab"]["Ġthe"] = len(data["model"]["vocab"])
    path.write_text(json.dumps(data))
    kept = choose_tokens(tmp_path, {lone}, 300)
    assert lone in kept.tolist()
    write_trimmed_tokenizer(tmp_path, tmp_path, kept)
    assert tokenizer_of(tmp_path).decode(tokenizer_of(tmp_path).encode("then the end")) == "then the end"


def test_special_tokens_at_the_end_of_the_vocabulary_get_new_numbers(tmp_path: Path) -> None:
    """Llama 3 and Qwen 2 keep them last, beyond the merged tokens and outside of model.vocab."""
    folder = make_model(tmp_path / "whole", vocab_size=410, bos_token_id=405, eos_token_id=[406, 407], pad_token_id=406)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    for token, number in (("<|begin|>", 405), ("<|end|>", 406), ("<|eot|>", 407)):
        data["added_tokens"].append({**data["added_tokens"][0], "content": token, "id": number})
    path.write_text(json.dumps(data))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"407": {"content": "<|eot|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [406, 407], "bos_token_id": 405, "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    used = tokenizer_of(folder).encode(TEXT[0], add_special_tokens=False)
    kept = choose_tokens(folder, used, 310)
    assert kept[-3:].tolist() == [405, 406, 407]
    small = tmp_path / "small"
    model = trim_vocabulary(load_model(folder), kept)
    model.save_pretrained(small)
    write_trimmed_tokenizer(folder, small, kept)
    assert tokenizer_of(small).encode("<|begin|>a<|eot|>", add_special_tokens=False)[::2] == [307, 309]
    loaded = load_model(small)
    for settings_ in (loaded.config, loaded.generation_config):
        assert (settings_.bos_token_id, settings_.eos_token_id) == (307, [308, 309])
    assert loaded.config.pad_token_id == 308
    assert loaded.generation_config.temperature == 0.6
    assert "309" in json.loads((small / "tokenizer_config.json").read_text())["added_tokens_decoder"]


def test_numbers_of_tokens_that_are_gone() -> None:
    found = renumber({"eos_token_id": [5, 9], "pad_token_id": 9, "bos_token_id": None, "x": 5}, {5: 2})
    assert found == {"eos_token_id": [2], "pad_token_id": None, "bos_token_id": None, "x": 5}


@pytest.mark.parametrize("tied", [True, False])
def test_the_trimmed_model_gives_the_kept_tokens_logits(tmp_path: Path, tied: bool) -> None:
    whole, kept = make_llama(2, tied=tied), np.array([0, 1, 7, 40, 41, 100, 250, 299])
    trim_vocabulary(make_llama(2, tied=tied), kept).save_pretrained(tmp_path)
    small = load_model(tmp_path).eval()
    assert small.config.vocab_size == 8
    assert (small.lm_head.weight is small.model.embed_tokens.weight) == tied
    ids = torch.tensor([[3, 1, 7, 0, 5]])
    with torch.no_grad():
        found, wanted = small(ids).logits, whole(torch.as_tensor(kept)[ids]).logits[..., kept]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def renumbered(example: Example, origin: Origin) -> Example:
    """Return the example as the trimmed tokenizer numbers it."""
    prompt, completion = (origin.numbers[list(ids)].tolist() for ids in (example.prompt_ids, example.completion_ids))
    return Example(example.id, tuple(prompt), tuple(completion))


@pytest.mark.parametrize("kind", ["sampled", "top-k", "top-sampled"])
def test_soft_targets_keep_what_is_left_of_them(kind: Any) -> None:
    model, examples = make_llama(), make_examples(6)
    text = {token for example in examples for token in (*example.prompt_ids, *example.completion_ids)}
    kept = np.asarray(sorted(text | set(range(0, VOCAB, 2))))
    origin = Origin(tokenizer="x", kept=kept)
    for whole, example in zip(score(model, examples, kind=kind), examples, strict=True):
        own = renumbered(example, origin)
        assert origin.example(own) == example
        found = origin.targets(whole, own)
        assert found.positions == whole.positions
        draws = whole.as_draws()
        for at in range(whole.positions):
            theirs = slice(whole.offsets[at], whole.offsets[at + 1])
            before = dict(zip(whole.ids[theirs].tolist(), whole.logp[theirs], strict=True))
            mine = slice(found.offsets[at], found.offsets[at + 1])
            after = dict(zip(kept[found.ids[mine]].tolist(), found.logp[mine], strict=True))
            left = {token: value for token, value in before.items() if token in set(kept.tolist())}
            if kind == "top-k":
                assert after == left
            elif left:
                counts = draws.counts[theirs] * (draws.counts[theirs] > 0)
                stay = np.isin(draws.ids[theirs], kept)
                share = counts[stay].sum() / counts.sum()
                assert after == pytest.approx(
                    {token: value - math.log(share) for token, value in left.items()}, abs=1e-5
                )
            else:
                assert after == {example.completion_ids[at]: 0.0}
        if kind != "top-k":
            weights = np.add.reduceat(found.probabilities(1.0), found.offsets[:-1])
            np.testing.assert_allclose(weights, 1.0, rtol=1e-5)


def test_a_position_without_any_draw_left_learns_its_own_token() -> None:
    model, examples = make_llama(), make_examples(3)
    text = {token for example in examples for token in (*example.prompt_ids, *example.completion_ids)}
    origin = Origin(tokenizer="x", kept=np.asarray(sorted(text)))
    emptied = 0
    for whole, example in zip(score(model, examples), examples, strict=True):
        own = tuple(origin.numbers[list(example.completion_ids)].tolist())
        found = origin.targets(whole, Example(example.id, (), own))
        for at in range(whole.positions):
            drawn = set(whole.ids[whole.offsets[at] : whole.offsets[at + 1]].tolist()) & text
            mine = slice(found.offsets[at], found.offsets[at + 1])
            if not drawn:
                emptied += 1
                assert found.ids[mine].tolist() == [own[at]]
                assert found.counts[mine].tolist() == [found.n]
            else:
                assert set(origin.kept[found.ids[mine]].tolist()) == drawn
    assert emptied, "no position lost all its draws: the test shows nothing"


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_a_trimmed_student_that_is_its_teacher_is_no_distance_away(temperature: float) -> None:
    """At a high temperature much of the teacher's mass is on tokens that were cut away: what is left adds up to 1."""
    model, examples = make_llama(), make_examples(16)
    kept = np.asarray(sorted({token for one in examples for token in (*one.prompt_ids, *one.completion_ids)}))
    assert len(kept) < 0.6 * VOCAB
    origin = Origin(tokenizer="x", kept=kept)
    distances = []
    for whole, example in zip(score(model, examples, n=60, temperature=temperature), examples, strict=True):
        own = renumbered(example, origin)
        targets = batch_targets([origin.targets(whole, own)], temperature)
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1][:, kept]
        distances += sparse_divergence(targets, logits, FORWARD_KL, temperature).tolist()
    assert abs(np.mean(distances)) < 0.05


def test_hidden_states_are_those_of_the_same_tokens() -> None:
    """A trimmed student that is the teacher otherwise is no distance away, under its own numbers."""
    examples = make_examples(4)
    kept = np.asarray(sorted({t for one in examples for t in (*one.prompt_ids, *one.completion_ids)} | {0, 1}))
    origin = Origin(tokenizer="x", kept=kept)
    own = [renumbered(one, origin) for one in examples]
    student = trim_vocabulary(make_llama(4), kept).eval()
    guide = HiddenStates(make_llama(4), range(4), tokens=kept.tolist())
    guide.watch(student)
    with packed_mode(student), torch.no_grad():
        batch = make_batch(own, packed=True)
        completion_states(student, batch)
        assert float(guide.error(batch)) == pytest.approx(0.0, abs=1e-6)
        guide.tokens = None
        completion_states(student, batch)
        assert float(guide.error(batch)) > 0.1


def test_too_small_and_other_tokenizers_are_refused(smollm2: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"need \d+ tokens") as found:
        choose_tokens(smollm2, range(1000, 3000), 1000)
    assert "student.vocabulary to " in found.value.hint
    check_trimmable(smollm2)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(UsageError, match="Unigram tokenizer"):
        check_trimmable(tmp_path)
    assert read_origin(tmp_path) is None


def test_llama_cpp_reads_it_as_transformers_does(tmp_path: Path) -> None:
    from edgedistill.formats.gguf.check import compare_logits
    from edgedistill.formats.gguf.convert import convert

    folder, small = make_model(tmp_path / "whole"), tmp_path / "small"
    used = {token for text in TEXT[:2] for token in tokenizer_of(folder).encode(text, add_special_tokens=False)}
    kept = choose_tokens(folder, used, 340)
    trim_vocabulary(load_model(folder), kept).save_pretrained(small)
    write_trimmed_tokenizer(folder, small, kept)
    converted = convert(small, tmp_path / "small.gguf", dtype="f32")
    report = compare_logits(small, converted.path, [[{"role": "user", "content": text}] for text in TEXT], texts=TEXT)
    assert report.max_diff < 0.05  # llama.cpp keeps keys and values in f16


def test_rows_in_other_pieces_have_no_soft_targets_and_unscored_ones_are_refused(tmp_path: Path) -> None:
    from edgedistill.training.recipe import encode_rows, load_targets
    from edgedistill.training.targets import TargetsHeader, TargetsWriter

    folder, small = make_model(tmp_path / "whole"), tmp_path / "small"
    whole = tokenizer_of(folder)
    rows = [
        Row(id=str(at), messages=({"role": "user", "content": text},), reference="ok") for at, text in enumerate(TEXT)
    ]
    examples = encode_rows(rows, folder)
    used = {token for one in examples[:2] for token in (*one.prompt_ids, *one.completion_ids)}
    kept = choose_tokens(folder, used, 340)
    trim_vocabulary(load_model(folder), kept).save_pretrained(small)
    write_trimmed_tokenizer(folder, small, kept)
    header = TargetsHeader(
        kind="sampled", n=12, temperature=1.0, temperatures=stored_temperatures(1.0), vocab_size=len(whole),
        tokenizer=tokenizer_hash(whole), teacher="t", seed=0,
    )  # fmt: skip
    with TargetsWriter(tmp_path / "targets" / "0.parquet", header) as writer:
        for one, soft in zip(examples[:4], score(load_model(folder).eval(), examples[:4]), strict=True):
            writer.write(one, soft)
    own = encode_rows(rows, small)
    left, targets = load_targets(tmp_path / "targets", own[:4], tokenizer_of(small), small)
    alike = [
        one.id
        for one, theirs in zip(own, examples, strict=True)
        if kept[list(one.prompt_ids)].tolist() == [*theirs.prompt_ids]
    ]
    assert [one.id for one in left] == alike[: len(left)] and {"0", "1"} <= {one.id for one in left} < set("0123")
    assert all(int(soft.ids.max()) < 340 for soft in targets)
    with pytest.raises(UsageError, match="'4' has no soft targets: it was not scored"):
        load_targets(tmp_path / "targets", own, tokenizer_of(small), small)
    odd = [one for one in own[:4] if one.id not in {one.id for one in left}]
    with pytest.raises(UsageError, match="cuts every scored row into other pieces"):
        load_targets(tmp_path / "targets", odd, tokenizer_of(small), small)
