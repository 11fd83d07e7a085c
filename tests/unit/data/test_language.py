"""The language of answers, by sentences that people would write in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedistill.data.language import LANGUAGES, NO_LANGUAGE, _identifier, other_language
from edgedistill.data.prompts import Row
from edgedistill.errors import RecipeError
from edgedistill.fingerprint import Key
from edgedistill.recipes import copy_recipe
from edgedistill.stages.filter import Filter
from tests.unit.test_plan import make

SENTENCES = {
    "en": ["The cat sat on the mat and looked at me.", "Play the next song, please.", "Hello, how are you today?",
           "Sure! Here is a short haiku about autumn leaves.", "Set an alarm for seven o'clock tomorrow"],
    "de": ["Der Hund lief schnell über die Straße.", "Guten Morgen, wie geht es dir heute?", "Ich weiß es leider nicht genau."],
    "fr": ["Je ne sais pas où se trouve la gare.", "La réponse est quarante-deux, bien sûr."],
    "es": ["El gato duerme en la silla de la cocina.", "¿Dónde está la biblioteca más cercana?"],
    "it": ["Il gatto dorme sulla sedia della cucina.", "Non so dove si trova la stazione."],
    "pl": ["Kot śpi na krześle w kuchni.", "Nie wiem, gdzie jest dworzec."],
    "tr": ["Kedi mutfaktaki sandalyede uyuyor.", "Tren istasyonunun nerede olduğunu bilmiyorum."],
    "ru": ["Москва является столицей России.", "Я не знаю, где находится вокзал."],
    "ja": ["東京は日本の首都です。", "駅がどこにあるか知りません。"],
    "zh": ["北京是中华人民共和国的首都。", "我不知道火车站在哪里。"],
    "ko": ["서울은 대한민국의 수도입니다.", "역이 어디에 있는지 모르겠습니다."],
    "ar": ["القاهرة هي عاصمة جمهورية مصر العربية."],
    "hi": ["नई दिल्ली भारत की राजधानी है।"],
}  # fmt: skip


@pytest.mark.parametrize("language", SENTENCES)
def test_sentences_are_in_their_language_and_in_no_far_one(language: str) -> None:
    for text in SENTENCES[language]:
        assert other_language(text, [language]) == "", text
        assert other_language(text, ["fi", language, "vi"]) == "", text
        if language != "en":
            assert other_language(text, ["en"]) == language, text
        else:
            assert other_language(text, ["ru"]) == "en", text


@pytest.mark.parametrize(
    "text",
    ["OK.", "42", "Ja, gut.", "C'est ça.", '{"name": "set_alarm", "arguments": {"titel": "Wecker stellen", "zeit": "07:00"}}',
     "```python\nfür = 'Straße über den Fluss'\nprint(für)\n```", "x = [i ** 2 for i in range(10)]; y = {k: v for k, v in z}",
     "1. 3.14159 2. 2.71828 3. 1.41421", "https://de.wikipedia.org/wiki/Straßenbahnhaltestelle", "", "   "],
)  # fmt: skip
def test_what_tells_too_little_passes(text: str) -> None:
    assert other_language(text, ["en"]) == ""


def test_prose_around_code_is_told() -> None:
    text = "Hier ist die Funktion, die du haben wolltest:\n```python\ndef f(x): return x\n```\nSie gibt zurück, was man ihr gibt."
    assert other_language(text, ["en"]) == "de" and other_language(text, ["de"]) == ""


def test_the_filter_names_the_language() -> None:
    spec = {"kind": "language", "languages": ["en", "fr"], "otherwise": "drop"}
    stage = Filter(answers=Key("a" * 64), rows_digest="", filters=(spec,), rows=())
    row = Row(id="r", messages=({"role": "user", "content": "?"},))
    found = [{"text": SENTENCES[one][0]} for one in ("en", "fr", "de")]
    assert [why for _, why in stage.judge(spec)(row, found)] == ["", "", "language: de"]


def test_languages_that_are_not_told_apart_are_refused_in_plan(tmp_path: Path) -> None:
    assert sorted(LANGUAGES) == sorted({*_identifier().labels} - {NO_LANGUAGE})
    folder = copy_recipe("quickstart", tmp_path / "quickstart")
    for languages, message in (
        (["en", "xx"], "no language 'xx'"),
        ([], "in which languages"),
        (["English"], "pattern"),
    ):
        with pytest.raises(RecipeError, match=message):
            make(folder, filter=[{"kind": "language", "languages": languages}])
    plan = make(folder, filter=[{"kind": "language", "languages": ["en"]}])
    assert plan.match("filter")[0].stage.fields()["filters"][0]["languages"] == ("en",)
