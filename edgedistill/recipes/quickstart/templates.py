"""Hold the wordings of the quickstart task, separately for train (shared by holdout) and for ood.

A wording is an imperative that begins in lower case and takes a polite beginning and end, or, marked by a leading `=`, a
sentence that stands as it is. `{slot}` names an entry of `values.SLOTS`.
"""

# ruff: noqa: E501
from __future__ import annotations

TRAIN: dict[str, tuple[str, ...]] = {
    "set_alarm": (
        "set an alarm for {time}", "set my alarm for {time}", "wake me up at {time}", "wake me at {time}",
        "set the alarm to {time}", "create an alarm for {time}", "add an alarm at {time}", "make an alarm for {time}",
        "give me an alarm at {time}", "set an alarm for {time} called {label}", "set an alarm at {time} for {label}",
        "add an alarm named {label} at {time}", "wake me up at {time} for {label}", "set a {label} alarm for {time}",
        "create an alarm called {label} for {time}", "set an alarm labeled {label} at {time}", "=I need an alarm at {time}",
        "=I need to wake up at {time}", "=I want to get up at {time}", "=alarm for {time}", "=I need an alarm for {label} at {time}",
        "schedule an alarm for {time}", "=I have to wake up at {time} for {label}", "put an alarm on for {time}",
    ),
    "set_timer": (
        "set a timer for {minutes}", "start a timer for {minutes}", "set a {minute} timer", "start a {minute} timer",
        "count down {minutes}", "start a countdown of {minutes}", "give me a {minute} timer", "set the timer to {minutes}",
        "put {minutes} on the timer", "set a {cooking} timer for {minutes}", "start a {minute} timer for the {cooking}",
        "time {minutes} for the {cooking}", "set a timer for {minutes} called {cooking}", "start a {cooking} timer for {minutes}",
        "=I need a timer for {minutes}", "=timer for {minutes}", "=I need a {minute} timer for the {cooking}",
        "create a {minute} timer named {cooking}", "=I want a {minute} countdown", "make a timer of {minutes}",
        "set a timer for the {cooking}, {minutes}", "=I need a {cooking} timer for {minutes}",
    ),
    "create_event": (
        "add {event} to my calendar {on_day} at {time}", "schedule {event} {on_day} at {time}", "schedule {event} for {day} at {time}",
        "put {event} on my calendar for {day}", "create an event called {event} {on_day} at {time}",
        "create an event for {day} called {event}", "add {event} to my calendar for {day}", "schedule {event} {on_day}",
        "book {event} for {day} at {time}", "make an appointment for {event} {on_day} at {time}", "plan {event} {on_day} at {time}",
        "put {event} in the calendar {on_day} at {time}", "add an event {on_day} at {time} called {event}",
        "set up {event} {on_day} at {time}", "=I have {event} {on_day} at {time}, add it to my calendar",
        "=I need {event} on the calendar for {day}", "=new event {on_day} at {time}: {event}", "=calendar event for {day}: {event}",
        "mark {event} on my calendar for {day}", "add a calendar entry for {event} {on_day} at {time}",
        "=I want to schedule {event} {on_day} at {time}",
    ),
    "send_message": (
        "tell {to} that {news}", "tell {to} {message}", "text {to} that {news}", "text {to} {message}",
        "send a message to {to} saying {message}", "send {to} a message saying {message}", "message {to} that {news}",
        "message {to} {message}", "send a text to {to} saying {message}", "send {to} a text that says {message}",
        "write to {to} that {news}", "let {to} know that {news}", "let {to} know {news}", "text {to} and say {message}",
        "send a message to {to}: {message}", "message {to} and say {message}", "=message for {to}: {message}",
        "=I want to text {to} that {news}", "=I need to tell {to} that {news}", "=text to {to}: {message}",
    ),
    "call_contact": (
        "call {name}", "phone {name}", "ring {name}", "dial {name}", "give {name} a call", "make a call to {name}", "call {name} {speaker}",
        "put a call through to {name}", "place a call to {name}", "start a call with {name}", "phone {name} {speaker}",
        "give {name} a ring", "call up {name}", "call {name} for me", "dial {name} {speaker}", "start a call with {name} {speaker}",
        "=I want to call {name}", "=I need to call {name}", "=I'd like to call {name} {speaker}", "=call to {name}",
        "=I need to phone {name} {speaker}", "ring up {name}",
    ),
    "navigate_to": (
        "navigate to {place}", "take me to {place}", "give me directions to {place}", "get directions to {place}",
        "show me the way to {place}", "find a route to {place}", "start navigation to {place}", "guide me to {place}",
        "navigate to {place} {mode}", "take me to {place} {mode}", "get directions to {place} {mode}", "find a route to {place} {mode}",
        "give me {moding} directions to {place}", "get {moding} directions to {place}", "route me to {place}",
        "show me how to get to {place} {mode}", "show me how to get to {place}", "=how do I get to {place}?",
        "=how do I get to {place} {mode}?", "=directions to {place}", "=I need directions to {place}", "=I want to go to {place} {mode}",
        "=I need to get to {place} {mode}",
    ),
    "play_media": (
        "play {song}", "play {song} by {artist}", "put on {song}", "put on {song} by {artist}", "play the song {song}",
        "play the song {song} by {artist}", "play the album {song} by {artist}", "start playing {song}", "start {song} by {artist}",
        "play me {song} by {artist}", "play some music, {song} by {artist}", "find {song} by {artist} and play it", "play the track {song}",
        "=I want to hear {song}", "=I want to hear {song} by {artist}", "=I'd like to listen to {song} by {artist}",
        "=I want to listen to {song}", "play {song} from {artist}", "queue up {song} by {artist}", "let me hear {song}",
    ),
    "set_volume": (
        "set the volume to {level}", "turn the volume to {level}", "change the volume to {level}", "put the volume at {level}",
        "set the {stream} volume to {level}", "turn the {stream} volume to {level}", "change the {stream} volume to {level}",
        "make the volume {level}", "set volume to {level}", "adjust the volume to {level}", "adjust the {stream} volume to {level}",
        "set {stream} volume to {level}", "put the {stream} volume at {level}", "bring the volume to {level}",
        "=volume to {level}", "=I want the volume at {level}", "=I'd like the {stream} volume at {level}", "=volume {level}",
        "=I need the {stream} volume at {level}", "bring the {stream} volume to {level}",
    ),
    "toggle_setting": (
        "turn {onoff} {setting}", "switch {onoff} {setting}", "turn {setting} {onoff}", "switch {setting} {onoff}", "{enable} {setting}",
        "put {setting} {onoff}", "=I want {setting} {onoff}", "=I need {setting} {onoff}", "=I want you to {enable} {setting}",
        "=I need to {enable} {setting}", "make sure {setting} is {onoff}", "=please have {setting} turned {onoff}",
        "=time to turn {onoff} {setting}", "=time to {enable} {setting}", "=I'd like {setting} {onoff}", "=I'd like to turn {onoff} {setting}",
        "turn {setting} {onoff} again", "{enable} {setting} on my phone", "turn {setting} {onoff} on this phone",
        "switch {setting} {onoff} on this device",
    ),
    "take_note": (
        "take a note: {note}", "make a note: {note}", "note that {fact}", "write down {note}", "take a note that says {note}",
        "make a note that {fact}", "write a note saying {note}", "save a note: {note}", "create a note that says {note}",
        "note down {note}", "write this down: {note}", "start a new note: {note}", "take down a note: {note}", "record a note: {note}",
        "=note to self: {note}", "=new note: {note}", "=I want to note that {fact}", "=I need to write down that {fact}",
        "save a note that says {note}", "take a quick note that {fact}",
    ),
    "add_to_list": (
        "add {item} to my {list} list", "put {item} on my {list} list", "add {item} to the {list} list", "put {item} on the {list} list",
        "write {item} on my {list} list", "add to my {list} list {item}", "include {item} on the {list} list",
        "put {item} onto my {list} list", "update my {list} list with {item}", "append {item} to my {list} list",
        "save {item} to the {list} list", "place {item} on my {list} list", "enter {item} on the {list} list",
        "=I need {item} on my {list} list", "=I want {item} on the {list} list", "=add to the {list} list: {item}",
        "=for my {list} list, add {item}", "=on the {list} list, put {item}", "=my {list} list needs {item}",
        "=I need to add {item} to my {list} list",
    ),
    "get_weather": (
        "tell me the weather in {town}", "tell me the weather in {town} {on_day}", "check the weather in {town}",
        "check the weather in {town} {on_day}", "show me the forecast for {town}", "show me the forecast for {town} {on_day}",
        "give me the weather for {town} {on_day}", "get the weather for {town}", "look up the weather in {town} {on_day}",
        "=what's the weather in {town}?", "=what's the weather in {town} {on_day}?", "=what is the weather like in {town}?",
        "=what is the weather like in {town} {on_day}?", "=how is the weather in {town}?", "=will it rain in {town} {on_day}?",
        "=weather in {town}", "=weather in {town} {on_day}", "=is it cold in {town}?", "=will it be sunny in {town} {on_day}?",
        "=I want the forecast for {town} {on_day}", "=I need the weather for {town}", "=what's the forecast for {town} {on_day}?",
    ),
}  # fmt: skip

OOD: dict[str, tuple[str, ...]] = {
    "set_alarm": (
        "get me out of bed at {time}", "have my phone ring at {time} to wake me", "make sure I'm awake by {time}",
        "=I must be up at {time}, so set an alarm", "=the alarm should go off at {time}", "=an alarm at {time} would help",
        "=could there be an alarm at {time}?", "use {time} as my alarm time", "=at {time} I need my alarm to ring", "=at {time}, wake me up",
        "=could you get an alarm going for {time}?", "program an alarm at {time} with the label {label}",
        "=at {time} I want an alarm called {label}",
    ),
    "set_timer": (
        "let me know when {minutes} are up", "run a {minute} timer", "=in {minutes}, let the timer ring", "=timer, {minutes}, go",
        "begin counting down from {minutes}", "have a timer go off in {minutes}", "=could I have a timer that lasts {minutes}?",
        "=the {cooking} needs {minutes}, start a timer", "track {minutes} for the {cooking} with a timer",
        "=for the {cooking}, run a timer of {minutes}", "get a timer going for {minutes}", "=a {minute} timer would be great",
    ),
    "create_event": (
        "pencil in {event} {on_day} at {time}", "block {day} at {time} for {event}", "reserve {day} on my calendar for {event}",
        "=we're doing {event} {on_day} at {time}, save that in my calendar", "=there's {event} {on_day}, please put it in my calendar",
        "=calendar, {day} at {time}, {event}", "enter {event} in my diary for {day} at {time}", "fit in {event} {on_day} at {time}",
        "=my calendar should show {event} {on_day}", "get {event} into my calendar {on_day} at {time}",
        "=could I get {event} scheduled {on_day} at {time}?",
    ),
    "send_message": (
        "shoot {to} a text saying {message}", "drop {to} a line that {news}", "inform {to} that {news}",
        "get a message to {to} that says {message}", "pass on to {to} that {news}", "={to} should know that {news}, so send a text",
        "use a text to let {to} know {news}", "fire off a text to {to} with the words {message}", "=new text for {to}, it says {message}",
        "write {to} a quick text, {message}", "ping {to} with a message that {news}",
    ),
    "call_contact": (
        "get {name} on the phone", "get {name} on the line", "connect me with {name}", "buzz {name}", "try calling {name}",
        "get me through to {name}", "=I'd love to talk to {name} on the phone", "=could we get a call going with {name}?",
        "=time to give {name} a phone call", "reach {name} by phone {speaker}", "=let's call {name} {speaker}",
        "have the phone dial {name} {speaker}", "get {name} on the phone {speaker}",
    ),
    "navigate_to": (
        "bring me to {place}", "lead me to {place}", "plot a course to {place}", "set {place} as my destination",
        "=what's the best way to {place}?", "=which way is it to {place}?", "=let's head to {place} {mode}", "=I'm going to {place} {mode}, guide me",
        "map out a trip to {place} {mode}", "=which route gets me to {place} {mode}?", "point me toward {place}",
        "=I'd like to reach {place} {mode}",
    ),
    "play_media": (
        "throw on {song} by {artist}", "blast {song}", "spin {song} by {artist}", "=how about some {song} by {artist}?",
        "=I'm in the mood for {song} by {artist}", "get {song} playing", "stream {song} by {artist}", "=let's listen to {song}",
        "=could I hear {song} by {artist}?", "=cue the music, I want {song} by {artist}", "=music please, {song}", "give {song} by {artist} a spin",
    ),
    "set_volume": (
        "take the volume to {level}", "move the volume slider to {level}", "have the {stream} volume sit at {level}",
        "=the volume should be {level}", "=the {stream} volume should be {level}", "=could the volume be {level}?", "=let's have the volume at {level}",
        "crank the {stream} volume to {level}", "fix the sound level at {level}", "=sound level {level}", "get the {stream} volume to {level}",
        "=for the {stream} volume, use {level}",
    ),
    "toggle_setting": (
        "get {setting} {onoff}", "flip {setting} {onoff}", "have {setting} switched {onoff}", "=could {setting} be turned {onoff}?",
        "=okay, {setting} {onoff}", "=I think {setting} should be {onoff}", "=let's {enable} {setting}", "=go ahead and {enable} {setting}",
        "=could we have {setting} {onoff}?", "=my phone needs {setting} {onoff}", "flick {setting} {onoff}", "=it's best to {enable} {setting} now",
    ),
    "take_note": (
        "jot down that {fact}", "jot this down: {note}", "put in my notes that {fact}", "keep a note saying {note}",
        "=here's something for my notes: {note}", "=my notes should say {note}", "=quick note, {note}", "log a note that {fact}",
        "add a note reading {note}", "get this into my notes: {note}", "capture this as a note: {note}", "scribble down that {fact}",
    ),
    "add_to_list": (
        "stick {item} on my {list} list", "throw {item} on the {list} list", "get {item} onto my {list} list", "jot {item} on the {list} list",
        "=could {item} go on my {list} list?", "=the {list} list should include {item}", "=let's have {item} on the {list} list",
        "=my {list} list is missing {item}, add it", "=we need {item}, so add that to the {list} list", "list {item} under my {list} list",
        "pop {item} on the {list} list", "=one more thing for my {list} list: {item}",
    ),
    "get_weather": (
        "let me know how the weather looks in {town}", "find out if it's raining in {town}", "=do I need an umbrella in {town} {on_day}?",
        "=should I expect snow in {town} {on_day}?", "=how hot will it get in {town} {on_day}?", "=what are the temperatures in {town} {on_day}?",
        "=is {town} going to be windy {on_day}?", "=any rain expected in {town} {on_day}?", "=how are conditions outside in {town}?",
        "pull up the weather report for {town}", "=what does the sky look like in {town}?", "=can I expect sunshine in {town} {on_day}?",
    ),
}  # fmt: skip

# (words before, words after, whether the whole becomes a question)
TRAIN_FRAMES: tuple[tuple[str, str, bool], ...] = (
    ("", "", False), ("", "", False), ("", "", False), ("", "", False), ("please ", "", False), ("", " please", False),
    ("can you ", "", True), ("could you ", "", True), ("can you ", " please", True), ("could you please ", "", True), ("hey, ", "", False),
    ("okay, ", "", False), ("hi, can you ", "", True), ("I need you to ", "", False), ("I'd like you to ", "", False),
    ("would you ", "", True), ("um, ", "", False), ("", " for me", False), ("will you ", "", True), ("", ", thanks", False), ("now ", "", False),
)  # fmt: skip
OOD_FRAMES: tuple[tuple[str, str, bool], ...] = (
    ("", "", False), ("", "", False), ("", "", False), ("would you kindly ", "", True), ("if you don't mind, ", "", False),
    ("right, ", "", False), ("", ", cheers", False), ("be so kind and ", "", False), ("", " if you can", False), ("do me a favor and ", "", False),
    ("any chance you could ", "", True), ("hello there, ", "", False), ("I was hoping you could ", "", False),
)  # fmt: skip

# Sentences around an ood request. They never name anything that could be an argument.
CONTEXT: dict[str, tuple[str, ...]] = {
    "set_alarm": ("I overslept again.", "I'm a heavy sleeper.", "I'm going to bed now.", "I can't be late again.", "It has been a long night."),
    "set_timer": ("I always lose track of time.", "My hands are full.", "I don't want to burn anything.", "I'm about to start.", "Okay, here we go."),
    "create_event": ("My week is filling up.", "I just got the details.", "I keep forgetting things.", "It's finally confirmed.", "We settled on a date."),
    "send_message": ("I can't type right now.", "My hands are wet.", "I promised to write.", "I'm carrying the groceries.", "I have no time to type."),
    "call_contact": ("It has been far too long.", "I can't find the number.", "I have some big news.", "My hands are full.", "I've missed two calls."),
    "navigate_to": ("I've never been there.", "I'm completely lost.", "I'm leaving in a minute.", "They're waiting for me.", "I don't know this area."),
    "play_media": ("It's too quiet in here.", "I had a rough day.", "I'm cooking and a bit bored.", "Let's lighten the mood.", "I love this one."),
    "set_volume": ("I can't hear a thing.", "It doesn't sound right.", "There's a lot of noise here.", "My ears hurt a little.", "People are staring at me."),
    "toggle_setting": ("I can't find the button.", "I'm in the menu but I'm lost.", "My hands are full.", "I was told to ask you.", "I never know where that is."),
    "take_note": ("I'm going to forget this.", "I just remembered something.", "My memory is terrible.", "Here is an important one.", "I can't find a pen."),
    "add_to_list": ("I just opened the fridge.", "I almost forgot.", "I thought of something.", "We never have enough.", "I'm planning ahead."),
    "get_weather": ("I'm packing my bag.", "I might travel there.", "I don't know what to wear.", "A friend lives there.", "We want to be outside."),
}  # fmt: skip
REMARKS: tuple[str, ...] = (
    "I keep forgetting.", "That would help a lot.", "Thank you so much.", "I'm in a bit of a hurry.", "You're the best.", "That's all for now.",
    "It's important.", "Sorry to bother you.", "I can't do it myself right now.", "No rush though.",
)  # fmt: skip
