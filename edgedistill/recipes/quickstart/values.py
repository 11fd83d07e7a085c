"""Make the argument values of the quickstart task, separately for train and for holdout.

Every open value (names, titles, places, texts...) is composed from word lists that come in two disjoint halves, so that
a value of the holdout suite never stands in the training file. Numbers and times are split by arithmetic. A generator
takes a `Chooser` and the half to draw from and returns `(surface, value)`: the words that go into the request, and the
argument that goes into the call.
"""

from __future__ import annotations

from collections.abc import Callable

from edgedistill.recipes.quickstart.words import (
    ACTIVITY,
    BAND,
    CITY,
    CODED,
    COOKING,
    COUNT,
    FIRST,
    FIXED,
    FOOD,
    FOOD_ADJ,
    GOODS,
    GOODS_ADJ,
    IDEA,
    KIN,
    LABEL,
    LAST,
    LIST_NAME,
    MEETING,
    NEWS,
    PLACE_KIND,
    PLACE_NAME,
    PORTABLE,
    SPOT,
    STATE,
    STREET_KIND,
    TITLE_ADJ,
    TITLE_NOUN,
    TITLED,
    TOPIC,
    TOWN,
    TOWN_FIRST,
    WORDS,
    Chooser,
)

Value = str | int | bool
Made = tuple[str, Value]

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
DAYS = ("today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SETTINGS = (
    ("wifi", "wifi"),
    ("Wi-Fi", "wifi"),
    ("the wifi", "wifi"),
    ("Bluetooth", "bluetooth"),
    ("bluetooth", "bluetooth"),
    ("the flashlight", "flashlight"),
    ("the torch", "flashlight"),
    ("my flashlight", "flashlight"),
    ("airplane mode", "airplane_mode"),
    ("flight mode", "airplane_mode"),
    ("do not disturb", "do_not_disturb"),
    ("do not disturb mode", "do_not_disturb"),
    ("dark mode", "dark_mode"),
    ("the dark theme", "dark_mode"),
    ("location", "location"),
    ("location services", "location"),
    ("the hotspot", "hotspot"),
    ("my hotspot", "hotspot"),
    ("battery saver", "battery_saver"),
    ("the battery saver", "battery_saver"),
    ("mobile data", "mobile_data"),
    ("my mobile data", "mobile_data"),
)
MODES = (
    ("on foot", "walking"),
    ("by bike", "cycling"),
    ("by bicycle", "cycling"),
    ("by car", "driving"),
    ("by bus", "transit"),
    ("by train", "transit"),
    ("by public transport", "transit"),
)
STREAMS = (
    ("media", "media"),
    ("music", "media"),
    ("video", "media"),
    ("ring", "ring"),
    ("ringer", "ring"),
    ("ringtone", "ring"),
    ("alarm", "alarm"),
)


def in_words(n: int) -> str:
    """Spell an integer from 0 to 100."""
    if n == 100:
        return "one hundred"
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def number_half(n: int) -> str:
    """Say which half an integer belongs to: a fifth of them, round ones too, are the holdout's."""
    return "holdout" if (n // 5 + n) % 5 == 2 else "train"


def time_half(hour: int, minute: int) -> str:
    """Say which half a time of day belongs to: every hour has minutes in both, and whole hours are split too."""
    return "holdout" if (7 * hour + minute // 5) % 5 == 0 else "train"


def _number(c: Chooser, half: str, low: int, high: int) -> int:
    while True:
        n = low + c.below(high - low + 1)
        if c.chance(0.5):
            n = max(low, n // 5 * 5)
        if number_half(n) == half:
            return n


def clock(c: Chooser, half: str) -> Made:
    """Make a time of day, said in one of five ways."""
    while True:
        hour = 5 + c.below(19)
        minute = c.pick((0, 0, 0, 0, 30, 30, 30, 15, 15, 45, 45, 5, 10, 20, 25, 35, 40, 50, 55))
        if time_half(hour, minute) == half:
            break
    value = f"{hour:02d}:{minute:02d}"
    if value == "12:00":
        return c.pick(("noon", "12 pm")), value
    twelve = (hour - 1) % 12 + 1
    half_day = "am" if hour < 12 else "pm"
    afternoon = "in the afternoon" if hour < 18 else "in the evening" if hour < 21 else "at night"
    part = "in the morning" if hour < 12 else afternoon
    digits = f"{twelve}" if minute == 0 else f"{twelve}:{minute:02d}"
    words = in_words(twelve)
    way = c.below(10)
    if way < 4:
        return f"{digits} {half_day}", value
    if way < 5:
        return value, value
    if way < 7:
        return f"{digits} {part}", value
    if minute == 30 and way == 7:
        return f"half past {words} {part}", value
    if minute == 15 and way == 7:
        return f"quarter past {words} {part}", value
    spoken = (
        words if minute == 0 else f"{words} oh {in_words(minute)}" if minute < 10 else f"{words} {in_words(minute)}"
    )
    return f"{spoken} {half_day if c.chance(0.5) else part}", value


_HOURS = (
    ("an hour", 60),
    ("one hour", 60),
    ("half an hour", 30),
    ("an hour and a half", 90),
    ("two hours", 120),
    ("2 hours", 120),
    ("three hours", 180),
)


def minutes(c: Chooser, half: str) -> Made:
    """Make a duration; hours are said in train only, where their conversion is learned."""
    if half == "train" and c.chance(0.12):
        return c.pick(_HOURS)
    n = _number(c, half, 2, 59)
    return f"{n if c.chance(0.5) else in_words(n)} minutes", n


def minute_adjective(c: Chooser, half: str) -> Made:
    """Make a duration that stands before a noun: a `10 minute` timer."""
    n = _number(c, half, 2, 59)
    while n in (8, 11, 18) or n // 10 == 8:  # these would want "an"
        n = _number(c, half, 2, 59)
    return f"{n if c.chance(0.5) else in_words(n)} minute", n


def level(c: Chooser, half: str) -> Made:
    """Make a percentage."""
    if half == "train" and c.chance(0.12):
        return c.pick((("maximum", 100), ("full", 100), ("half", 50), ("zero", 0)))
    n = _number(c, half, 1, 100)
    return f"{n if c.chance(0.6) else in_words(n)}{' percent' if c.chance(0.75) else ''}", n


def _same(make: Callable[[Chooser, str], str]) -> Callable[[Chooser, str], Made]:
    def made(c: Chooser, half: str) -> Made:
        text = make(c, half)
        return text, text

    return made


def _name(c: Chooser, half: str) -> str:
    way = c.below(20)
    if way < 10:
        return FIRST.pick(c, half)
    if way < 17:
        return f"{FIRST.pick(c, half)} {LAST.pick(c, half)}"
    if way < 19:
        return KIN.pick(c, half)
    return f"{TITLED.pick(c, half)} {LAST.pick(c, half)}"


def _place(c: Chooser, half: str) -> str:
    if c.chance(0.35):
        return f"{_number(c, half, 2, 99)} {PLACE_NAME.pick(c, half)} {STREET_KIND.pick(c, half)}"
    if c.chance(0.15):
        return f"{FIRST.pick(c, half)}'s {PLACE_KIND.pick(c, half)}"
    return f"{PLACE_NAME.pick(c, half)} {PLACE_KIND.pick(c, half)}"


def _town(c: Chooser, half: str) -> str:
    return CITY.pick(c, half) if c.chance(0.6) else f"{TOWN_FIRST.pick(c, half)} {TOWN.pick(c, half)}"


def _song(c: Chooser, half: str) -> str:
    adjective, noun, other = TITLE_ADJ.pick(c, half), TITLE_NOUN.pick(c, half), TITLE_NOUN.pick(c, half)
    plain = f"{adjective} {noun}"
    return c.pick((plain, plain, f"The {plain}", f"My {plain}", f"{noun} and {other}" if noun != other else plain))


def _artist(c: Chooser, half: str) -> str:
    if c.chance(0.5):
        return f"The {TITLE_ADJ.pick(c, half)} {BAND.pick(c, half)}"
    return f"{FIRST.pick(c, half)} {LAST.pick(c, half)}"


def _event(c: Chooser, half: str) -> str:
    if c.chance(0.4):
        return f"{ACTIVITY.pick(c, half)} with {_name(c, half)}"
    return f"{TOPIC.pick(c, half)} {MEETING.pick(c, half)}"


def _message(c: Chooser, half: str) -> str:
    """Make any message; one in four is no statement, so that it cannot follow "that"."""
    if c.chance(0.75):
        return _news(c, half)
    return WORDS.pick(c, half) if c.chance(0.5) else f"please bring the {PORTABLE.pick(c, half)}"


def _news(c: Chooser, half: str) -> str:
    return c.pick(
        (
            NEWS.pick(c, half),
            f"the {FIXED.pick(c, half)} is {STATE.pick(c, half)}",
            f"I left the {PORTABLE.pick(c, half)} in the {SPOT.pick(c, half)}",
            f"I'll be there in {_number(c, half, 5, 59)} minutes",
            f"I bought {_item(c, half)}",
            f"we are meeting at {_place(c, half)}",
        )
    )


def _note(c: Chooser, half: str) -> str:
    """Make any note; one in four is a thing to do, so that it cannot follow "that"."""
    return _fact(c, half) if c.chance(0.75) else IDEA.pick(c, half)


def _fact(c: Chooser, half: str) -> str:
    thing = PORTABLE.pick(c, half)
    return c.pick(
        (
            f"the {thing} is in the {SPOT.pick(c, half)}",
            f"the {thing} cost {_number(c, half, 5, 99)} dollars",
            f"{FIRST.pick(c, half)} likes {_item(c, half)}",
            f"the {CODED.pick(c, half)} code is {_code(c, half)}",
            f"the {FIXED.pick(c, half)} is {STATE.pick(c, half)}",
            f"{_name(c, half)} borrowed the {thing}",
        )
    )


def _code(c: Chooser, half: str) -> str:
    return f"{_number(c, half, 10, 99)}{_number(c, half, 10, 99)}"


def _item(c: Chooser, half: str) -> str:
    food = c.chance(0.5)
    what = (FOOD if food else GOODS).pick(c, half)
    way = c.below(10)
    if way < 2:
        return what
    return f"{(COUNT if way < 5 else FOOD_ADJ if food else GOODS_ADJ).pick(c, half)} {what}"


def _day(c: Chooser, half: str) -> Made:
    day = c.pick(DAYS)
    return day, day.lower()


def _on_day(c: Chooser, half: str) -> Made:
    day = c.pick(DAYS)
    return (day if day[0].islower() else f"{c.pick(('on', 'on', 'this'))} {day}"), day.lower()


def _onoff(c: Chooser, half: str) -> Made:
    on = c.chance(0.5)
    return ("on" if on else "off"), on


def _enable(c: Chooser, half: str) -> Made:
    return c.pick((("enable", True), ("activate", True), ("disable", False), ("deactivate", False)))


# slot -> (argument, generator)
SLOTS: dict[str, tuple[str, Callable[[Chooser, str], Made]]] = {
    "time": ("time", clock),
    "label": ("label", _same(LABEL.pick)),
    "minutes": ("minutes", minutes),
    "minute": ("minutes", minute_adjective),
    "cooking": ("label", _same(COOKING.pick)),
    "event": ("title", _same(_event)),
    "day": ("day", _day),
    "on_day": ("day", _on_day),
    "to": ("to", _same(_name)),
    "message": ("text", _same(_message)),
    "news": ("text", _same(_news)),
    "name": ("name", _same(_name)),
    "speaker": ("speaker", lambda c, half: (c.pick(("on speaker", "on speakerphone", "on the loudspeaker")), True)),
    "place": ("place", _same(_place)),
    "mode": ("mode", lambda c, half: c.pick(MODES)),
    "moding": (
        "mode",
        lambda c, half: c.pick((("walking", "walking"), ("driving", "driving"), ("cycling", "cycling"))),
    ),
    "song": ("title", _same(_song)),
    "artist": ("artist", _same(_artist)),
    "level": ("level", level),
    "stream": ("stream", lambda c, half: c.pick(STREAMS)),
    "setting": ("setting", lambda c, half: c.pick(SETTINGS)),
    "onoff": ("on", _onoff),
    "enable": ("on", _enable),
    "note": ("text", _same(_note)),
    "fact": ("text", _same(_fact)),
    "list": ("list", _same(LIST_NAME.pick)),
    "item": ("item", _same(_item)),
    "town": ("place", _same(_town)),
}
# Free text without capitals at the end of a request runs into whatever follows: nothing polite may follow.
OPEN_ENDED = ("label", "event", "message", "news", "note", "fact", "item")
