"""Targets: the shipped profiles, look-up, what is refused, and what a measurement on this host proves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgedistill.devices.host import HostFingerprint
from edgedistill.errors import RecipeError, UsageError
from edgedistill.target import (
    FEATURES,
    Limits,
    check_target,
    detect,
    find_target,
    format_size,
    list_targets,
    matches_host,
    packaged_folder,
    parse_size,
    to_toml,
)

GOOD = """
summary = "a class of boards"
arch = "aarch64"
features = ["dotprod"]
[runtime]
format = "gguf"
engine = "llama.cpp"
threads = 4
context = 2048
[quantize]
type = "Q4_0"
imatrix = true
[limits]
file_size = "600 MiB"
tg128 = 12.0
"""


def host(**changes: object) -> HostFingerprint:
    fields: dict[str, object] = {
        "arch": "aarch64",
        "cpu": "Cortex-A78",
        "features": ("neon", "dotprod"),
        "cores": 8,
        "memory_bytes": 8 << 30,
        "system": "Linux",
    }
    return HostFingerprint(**{**fields, **changes})  # type: ignore[arg-type]


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "board.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"board\.toml:\d+") as caught:
        check_target(path)
    return str(caught.value).replace(str(path), "board.toml")


@pytest.mark.parametrize("path", sorted(packaged_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_profile_is_whole_and_says_where_its_numbers_come_from(path: Path) -> None:
    target = check_target(path)
    limits = target.limits.model_dump()
    assert all(limits.values()), "a shipped profile sets every limit"
    assert target.limits.peak_rss > target.limits.file_size  # type: ignore[operator]
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(comment) >= 2
    assert "GB/s" in path.read_text() or "laptop-x86" in path.read_text()
    assert "my " not in target.summary


def test_eight_profiles_of_both_architectures_and_formats() -> None:
    targets = list_targets()
    assert len(targets) >= 8
    assert [target.name for target in targets] == sorted(target.name for target in targets)
    assert {target.arch for target in targets} == set(FEATURES)
    assert {target.runtime.format for target in targets} == {"gguf", "onnx"}


def test_your_own_targets_are_listed_and_go_before_the_packaged_ones(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    packaged = find_target("laptop-x86").path
    assert packaged is not None
    mine = packaged.read_text().replace("summary", 'summary = "mine"\n# was', 1)
    for name in ("board", "laptop-x86"):
        (tmp_path / "targets" / f"{name}.toml").write_text(mine)
    found = {target.name: target for target in list_targets(tmp_path)}
    assert found["board"].summary == found["laptop-x86"].summary == "mine"
    assert found.keys() == {*(target.name for target in list_targets()), "board"}

    (tmp_path / "targets" / "other.toml").write_text("[build-system]\n")
    with pytest.raises(RecipeError, match=r"other\.toml"):
        list_targets(tmp_path)
    told: list[UsageError] = []
    assert [target.name for target in list_targets(tmp_path, told.append)] == list(found)
    (error,) = told
    assert "other.toml" in str(error)


def test_targets_file_of_the_design_reads_as_written() -> None:
    target = find_target("phone-midrange")
    assert (target.name, target.arch, target.features) == ("phone-midrange", "aarch64", ("dotprod",))
    assert (target.runtime.threads, target.runtime.context) == (4, 2048)
    assert (target.quantize.type, target.quantize.imatrix) == ("Q4_0", True)
    assert (target.limits.file_size, target.limits.pp512, target.limits.ttft_p95_ms) == (600 << 20, 60.0, 900)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"Q4_0"',
            '"Q4KM"',
            'board.toml:11: quantize.type: "Q4KM" is no type of gguf; did you mean "Q4_K_M"? It has BF16',
        ),
        ('"Q4_0"', '"Q4_X"', 'board.toml:11: quantize.type: "Q4_X" is no type of gguf'),
        ('"Q4_0"\nimatrix = true', '"auto"', 'quantize.type: "auto" needs the calibration set'),
        ('"Q4_0"', '"int4"', 'board.toml:11: quantize.type: "int4" is no type of gguf'),
        ("imatrix = true", 'embedding_type = "Q9"', "board.toml:12: quantize.embedding_type"),
        (
            '"dotprod"',
            '"dotprd"',
            'board.toml:4: features[0]: "dotprd" is no feature of aarch64; did you mean "dotprod"?',
        ),
        ('"dotprod"', '"avx2"', 'board.toml:4: features[0]: "avx2" is no feature of aarch64'),
        ('"aarch64"', '"arm64"', 'board.toml:3: arch: expected "x86_64", "aarch64"; found "arm64"'),
        ('"llama.cpp"', '"onnxruntime-genai"', "board.toml:7: runtime.engine"),
        ("threads = 4", "thread = 4", 'runtime.thread: unknown key; did you mean "threads"?'),
        ("threads = 4", "threads = 0", "runtime.threads: expected a value greater than or equal to 1"),
        ('"600 MiB"', '"600 MegaB"', 'limits.file_size: expected a size such as "600 MiB"'),
        ('"600 MiB"', "true", "limits.file_size: expected a size"),
        ("tg128 = 12.0", "tg128 = -1.0", "limits.tg128"),
        ("tg128 = 12.0", "tg127 = 12.0", 'limits.tg127: unknown key; did you mean "tg128"?'),
        ('summary = "a class of boards"', "", "summary: this key is missing"),
    ],
)
def test_wrong_target_is_refused_with_line_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    assert message in refused(tmp_path, GOOD.replace(old, new))


def test_onnx_target_takes_a_type_and_what_that_type_has(tmp_path: Path) -> None:
    onnx = GOOD.replace('"gguf"', '"onnx"').replace('"llama.cpp"', '"onnxruntime-genai"').replace('"Q4_0"', '"int8"')
    assert 'quantize.imatrix: unknown key: format = "onnx" has type, size, rounding' in refused(tmp_path, onnx)
    path = tmp_path / "onnx.toml"
    path.write_text(onnx.replace("imatrix = true\n", ""))
    target = check_target(path)
    assert (target.quantize.type, target.quantize.block, target.quantize.symmetric) == ("int8", 32, True)
    fine = target.with_types({"type": "int4", "block": 128, "symmetric": False, "accuracy": 1, "rounding": "gptq"})
    assert (fine.quantize.block, fine.quantize.symmetric, fine.quantize.accuracy) == (128, False, 1)
    path.write_text(to_toml(fine))
    assert check_target(path).quantize == fine.quantize
    assert target.with_types({"type": "auto"}).auto_size == target.limits.file_size
    for changes, said in (
        ({"rounding": "gptq"}, "int8 of onnx has none: leave it out, or take type int4"),
        ({"type": "mixed", "symmetric": False}, "mixed of onnx has none"),
        (
            {"type": "auto", "block": 64},
            "block: auto of onnx has none: leave it out, or take type int8 or int4 or mixed",
        ),
        ({"type": "int4", "size": "1 MiB"}, "size: int4 of onnx has none: leave it out, or take type auto"),
        ({"type": "int4", "block": 48}, "quantize.onnx.block: Input should be 32, 64 or 128"),
        ({"type": "Q4_0"}, '"Q4_0" is no type of onnx'),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            target.with_types(changes)
    with pytest.raises(UsageError, match=r'laptop-x86\.block: unknown key: format = "gguf" has none'):
        find_target("laptop-x86").with_types({"block": 32})


def test_what_came_later_is_no_part_of_a_package_until_it_is_used() -> None:
    plain = find_target("laptop-x86-onnx")
    assert set(plain.to_json()["quantize"]) == {"type", "imatrix", "embedding_type", "output_type", "rounding"}
    other = plain.with_types({"type": "int4", "block": 128})
    assert other.to_json()["quantize"]["block"] == 128 and "symmetric" not in other.to_json()["quantize"]


def test_look_up_prefers_the_recipe_and_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "phone-midrange.toml").write_text(GOOD)
    (tmp_path / "targets" / "board.toml").write_text(GOOD)
    assert find_target("phone-midrange", tmp_path).summary == "a class of boards"
    assert find_target("board", tmp_path).path == tmp_path / "targets" / "board.toml"
    assert find_target("targets/board.toml", tmp_path).name == "board"
    assert find_target(str(tmp_path / "targets" / "board.toml")).name == "board"
    with pytest.raises(UsageError, match='no target is called "borad"; did you mean "board"'):
        find_target("borad", tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        find_target(str(tmp_path / "nowhere.toml"))


def test_recipe_may_replace_types_and_only_what_the_format_has() -> None:
    target = find_target("laptop-x86")
    changed = target.with_types({"type": "Q8_0"})
    assert (changed.quantize.type, changed.name, target.quantize.type) == ("Q8_0", "laptop-x86", "Q4_K_M")
    assert target.with_types({"imatrix": False}).quantize.imatrix is False
    with pytest.raises(UsageError, match=r'quantize\.laptop-x86\.type: "Q8" is no type of gguf'):
        target.with_types({"type": "Q8"})
    with pytest.raises(UsageError, match=r'quantize\.laptop-x86\.tpe: unknown key; did you mean "type"'):
        target.with_types({"tpe": "Q8_0"})
    with pytest.raises(UsageError, match="imatrix: unknown key"):
        find_target("laptop-x86-onnx").with_types({"imatrix": True})


def test_rounding_with_feedback_needs_a_type_and_text_for_it() -> None:
    target = find_target("phone-midrange")
    assert target.quantize.rounding == "nearest"
    assert target.with_types({"rounding": "gptq"}).quantize.rounding == "gptq"
    for type_ in ("Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_XS"):
        assert target.with_types({"type": type_, "imatrix": True, "rounding": "gptq"}).quantize.rounding == "gptq"
    with pytest.raises(UsageError, match=r'rounding: "gptq" rounds .*, Q4_K, .*, not F16$'):
        target.with_types({"type": "F16", "rounding": "gptq"})
    with pytest.raises(UsageError, match=r"IQ4_XS, not IQ3_S, whose codes stand for several weights each"):
        target.with_types({"type": "IQ3_S", "imatrix": True, "rounding": "gptq"})
    with pytest.raises(UsageError, match="needs the calibration set: add imatrix = true"):
        target.with_types({"imatrix": False, "rounding": "gptq"})


def test_a_choice_of_types_needs_text_and_a_size() -> None:
    target = find_target("phone-midrange")
    assert target.limits.file_size and target.with_types({"type": "auto"}).auto_size == target.limits.file_size
    smaller = target.with_types({"type": "auto", "size": "60 MiB"})
    assert smaller.auto_size == smaller.quantize.size == 60 * 2**20
    assert target.with_types({"type": "auto", "size": "60 GiB"}).auto_size == target.limits.file_size
    again = smaller.with_types({"type": "auto", "rounding": "gptq"})
    assert again.quantize.size == 60 * 2**20 and again.with_types({"type": "Q4_0"}).quantize.size is None
    for changes, said in (
        ({"imatrix": False}, 'type: "auto" needs the calibration set'),
        ({"embedding_type": "Q8_0"}, 'embedding_type: type = "auto" chooses it'),
    ):
        with pytest.raises(UsageError, match=said):
            target.with_types({"type": "auto", **changes})
    with pytest.raises(UsageError, match='size: only type = "auto" keeps to a size'):
        target.with_types({"type": "Q4_0", "size": "60 MiB"})
    with pytest.raises(UsageError, match='"auto" needs a size to keep to'):
        target.model_copy(update={"limits": Limits()}).with_types({"type": "auto"})


@pytest.mark.parametrize(
    ("changes", "proved", "reason"),
    [
        ({}, True, ""),
        ({"arch": "x86_64"}, False, "measured on x86_64, the target is aarch64"),
        ({"features": ("neon",)}, False, "measured without dotprod, which the target has"),
        ({"features": ("neon", "dotprod", "i8mm")}, False, "measured with i8mm, which the target lacks"),
        ({"cores": 2}, False, "measured on 2 cores, the target runs 4 threads"),
    ],
)
def test_a_measurement_proves_only_what_the_host_is(changes: dict[str, object], proved: bool, reason: str) -> None:
    assert matches_host(find_target("phone-midrange"), host(**changes)) == (proved, reason)


def test_a_server_proves_no_laptop() -> None:
    """AVX-512 reads prompts at twice the speed of the AVX2 that laptops have."""
    server = host(arch="x86_64", features=("f16c", "fma", "avx2", "avx512", "avx512_vnni", "amx_int8"), cores=8)
    assert (
        matches_host(find_target("laptop-x86"), server)[1] == "measured with avx512, amx_int8, which the target lacks"
    )
    assert matches_host(find_target("desktop-x86"), server)[1] == "measured with amx_int8, which the target lacks"
    plain = host(arch="x86_64", features=("f16c", "fma", "avx2", "avx_vnni"), cores=8)
    assert matches_host(find_target("laptop-x86"), plain) == (True, "")


def test_detected_target_is_this_host_and_survives_being_written(tmp_path: Path) -> None:
    from edgedistill.devices.host import fingerprint

    target = detect()
    assert matches_host(target, fingerprint()) == (True, "")
    path = tmp_path / "here.toml"
    path.write_text(to_toml(target))
    assert check_target(path).model_dump() == target.model_dump()


@pytest.mark.parametrize("name", [target.name for target in list_targets()])
def test_every_target_survives_being_written(tmp_path: Path, name: str) -> None:
    target = find_target(name)
    path = tmp_path / f"{name}.toml"
    path.write_text(to_toml(target))
    assert check_target(path).model_dump() == target.model_dump()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600 MiB", 600 << 20),
        ("1.2 GiB", 1288490189),
        ("90MB", 90_000_000),
        ("512", 512),
        (2048, 2048),
        ("1 gib", 1 << 30),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1 MiB", "0", "1 TiB?", "1,5 GiB", 1.5])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)  # type: ignore[arg-type]


def test_sizes_are_written_as_people_read_them() -> None:
    assert [format_size(size) for size in (600 << 20, 1288490189, 2048, 12)] == ["600 MiB", "1.2 GiB", "2 KiB", "12 B"]
