"""Hold what drills.jsonl has beside the wordings and values of train: more ways of asking, and words to be copied.

Many words, because a small student learns the words that it meets rather than to copy ("olas" for "olives"). None of them is
in a holdout value, and none of these wordings or frames is in ood.
"""

# ruff: noqa: E501
from __future__ import annotations

from pathlib import Path

MORE_WORDINGS: dict[str, tuple[str, ...]] = {
    "set_alarm": (
        "get me up at {time}", "=I'd like you to wake me around {time}", "rouse me at {time}", "schedule a wake-up call for {time}",
        "ring me awake at {time}", "fix an alarm for {time}", "line up an alarm for {time}", "add a wake-up alarm for {time} named {label}",
        "=don't let me sleep past {time}", "=can I have an alarm at {time}?", "=I'm getting up at {time}", "=wake-up time is {time}",
        "=I should be up by {time}", "=alarm, {time}, {label}", "=tomorrow starts at {time}, wake me then", "=let me sleep until {time}",
        "=for {label}, wake me at {time}", "=there should be an alarm at {time} for {label}", "=please, an alarm for {time} tagged {label}",
        "=I have {label} at {time}, set an alarm", "=my alarm has to sound at {time}",
    ),
    "set_timer": (
        "remind me in {minutes}", "alert me after {minutes}", "beep after {minutes}", "time me for {minutes}", "measure {minutes}",
        "launch a {minute} countdown", "kick off a timer of {minutes}", "count {minutes} for me", "let {minutes} run on the clock",
        "=how about a {minute} timer?", "=I have {minutes}, time it", "=the timer should be {minutes} long", "=tell me when {minutes} have passed",
        "=can I get {minutes} on the clock?", "=my {cooking} takes {minutes}, time it", "=I'm making {cooking}, set {minutes}",
        "=the {cooking} timer should take {minutes}", "=countdown for the {cooking}: {minutes}", "=wait {minutes}, then ring",
        "watch the clock for {minutes} for my {cooking}", "set the clock for {minutes}, it's for the {cooking}",
    ),
    "create_event": (
        "arrange {event} for {day} at {time}", "note {event} {on_day} at {time} in my agenda", "fill {day} at {time} with {event}",
        "keep {day} free for {event}", "organize {event} {on_day} at {time}", "log {event} on my schedule {on_day} at {time}",
        "save the date for {event} {on_day}", "write {event} into my planner {on_day} at {time}", "insert {event} {on_day} at {time} in my agenda",
        "=I'm having {event} {on_day} at {time}", "={event} is happening {on_day} at {time}, save it", "=can I have {event} {on_day} at {time} in my schedule?",
        "=my schedule {on_day} at {time}: {event}", "={day} at {time} is taken, {event}", "={event}, {day}, {time}, calendar please",
        "=I said yes to {event} {on_day} at {time}", "=don't let me miss {event} {on_day} at {time}",
        "=is there room {on_day} at {time} for {event}?", "give {event} a place {on_day} at {time}", "register {event} in my agenda for {day}",
    ),
    "send_message": (
        "notify {to} that {news}", "tell {to} by text that {news}", "let {to} hear that {news}", "mention to {to} that {news}",
        "report to {to} that {news}", "deliver a message to {to}: {message}", "compose a text to {to}: {message}", "reply to {to} with {message}",
        "answer {to} with {message}", "say to {to} {message}", "leave {to} a message saying {message}", "forward this to {to}: {message}",
        "=can {to} be told that {news}?", "=please make {to} aware that {news}", "=I want {to} to know that {news}", "=a message for {to} please: {message}",
        "=my message to {to} is {message}", "=sms to {to}: {message}", "=type this to {to}: {message}", "=to {to}: {message}",
    ),
    "call_contact": (
        "contact {name} by phone", "get in touch with {name} by phone", "telephone {name}", "call {name} now", "make {name}'s phone ring",
        "set up a call with {name}", "begin a call to {name}", "open a line to {name}", "call {name} back", "put {name} on the phone with me",
        "=can I speak to {name}?", "=I'd like to speak with {name}", "=I have to call {name}", "=I should phone {name}", "=is {name} free for a call?",
        "=I want a word with {name} on the phone", "=phone call to {name}", "=can we call {name} {speaker}?", "=let me talk to {name}",
        "=I want to talk to {name} {speaker}", "telephone {name} {speaker}", "set up a call with {name} {speaker}",
    ),
    "navigate_to": (
        "drive me to {place}", "direct me to {place}", "steer me to {place}", "find {place} on the map and take me there", "open the route to {place}",
        "calculate the way to {place}", "plan a route to {place} {mode}", "show directions for {place}", "give me the fastest way to {place} {mode}",
        "walk me through the way to {place}", "get me over to {place} {mode}", "send me the way to {place}", "start a trip to {place} {mode}",
        "=where is {place}?", "=how can I reach {place} {mode}?", "=I'm trying to get to {place}", "=I have to be at {place} soon, guide me",
        "=I'm looking for {place}", "=can you get me to {place} {mode}?", "=we're driving to {place}, show the way", "=destination {place}",
        "=next stop {place} {mode}",
    ),
    "play_media": (
        "turn on {song} by {artist}", "run the track {song}", "give me {song} by {artist}", "start the song {song} by {artist}", "put {song} on",
        "load up {song} by {artist}", "fire up {song}", "select {song} by {artist}", "choose {song} and play it", "shuffle to {song} by {artist}",
        "play something, maybe {song} by {artist}", "switch to {song} by {artist}", "open {song} in the player", "sing me {song}",
        "=can I listen to {song} by {artist}?", "=I feel like hearing {song}", "=I'm craving {song} by {artist}", "=my favorite, {song} by {artist}",
        "=next song: {song}", "=time for {song} by {artist}", "=we want {song} by {artist}",
    ),
    "set_volume": (
        "raise the volume to {level}", "lower the volume to {level}", "push the {stream} volume to {level}", "drop the {stream} volume to {level}",
        "reduce the volume to {level}", "increase the {stream} volume to {level}", "dial the volume to {level}", "tune the {stream} volume to {level}",
        "hold the volume at {level}", "play everything at {level} volume", "switch the volume to {level}", "leave the {stream} volume at {level}",
        "=can I have the volume at {level}?", "=how about {level} for the volume?", "=make that {level} volume", "=my {stream} sounds go to {level} in volume",
        "=my {stream} volume should go to {level}", "=loudness {level}", "=I prefer the {stream} volume at {level}", "=too loud, set it to {level}",
    ),
    "toggle_setting": (
        "bring {setting} {onoff}", "make {setting} go {onoff}", "keep {setting} {onoff}", "leave {setting} {onoff}", "change {setting} to {onoff}",
        "set {setting} to {onoff}", "toggle {setting} {onoff}", "start by turning {setting} {onoff}", "quickly {enable} {setting}",
        "=I'm done with menus, {enable} {setting}", "=is it possible to {enable} {setting}?", "=I would like {setting} to be {onoff}", "=I want to {enable} {setting}",
        "={setting} {onoff} please", "=I'll take {setting} {onoff}", "=how do I {enable} {setting}? do it for me", "=you can {enable} {setting} now",
        "=we should {enable} {setting}", "=I have to {enable} {setting}", "=phone, {enable} {setting}",
    ),
    "take_note": (
        "remember that {fact}", "remember this: {note}", "keep in mind that {fact}", "put this on paper: {note}", "file a note: {note}",
        "store this note: {note}", "type up a note: {note}", "memorize that {fact}", "document that {fact}", "don't forget that {fact}",
        "hold on to this thought: {note}", "open a note and write {note}", "post a note saying {note}",
        "=a note please: {note}", "=can you remember that {fact}?", "=reminder for later: {note}", "=memo: {note}", "=for the record, {fact}",
        "=I must remember that {fact}", "=this goes in my notes: {note}", "=I'd like a note that says {note}",
    ),
    "add_to_list": (
        "slip {item} onto my {list} list", "move {item} to the {list} list", "drop {item} into my {list} list", "register {item} on the {list} list",
        "bring {item} onto my {list} list", "extend the {list} list with {item}", "note {item} on the {list} list", "attach {item} to my {list} list",
        "set {item} down on my {list} list", "have {item} added to the {list} list", "insert {item} in my {list} list",
        "=the {list} list gets {item}", "=the {list} list still needs {item}", "=I'm out of {item}, {list} list please", "=next on the {list} list: {item}",
        "=don't forget {item} for the {list} list", "=we have no {item}, note it on the {list} list", "={list} list: {item}", "={item} belongs on my {list} list",
        "=I'd like {item} added to my {list} list", "=remember {item} for my {list} list",
    ),
    "get_weather": (
        "describe the weather in {town}", "report the weather in {town} {on_day}", "find the forecast for {town} {on_day}", "see what the weather is in {town}",
        "fetch the weather for {town} {on_day}", "read me the forecast for {town}", "bring up the weather in {town}",
        "=what's it like outside in {town}?", "=is it raining in {town}?", "=is it warm in {town} {on_day}?", "=what should I wear in {town} {on_day}?",
        "=will it snow in {town} {on_day}?", "=how cold is {town} right now?", "=the weather in {town} {on_day}, please", "=does it look like rain in {town} {on_day}?",
        "=what will {town} be like {on_day}?", "=is the sun out in {town}?", "=are there storms in {town} {on_day}?", "=forecast {town} {on_day}",
        "=I wonder how the weather is in {town}", "=can you tell me if {town} is sunny {on_day}?",
    ),
}  # fmt: skip
MORE_FRAMES: tuple[tuple[str, str, bool], ...] = (
    ("", "", False), ("", "", False), ("", "", False), ("hey there, ", "", False), ("so, ", "", False), ("alright, ", "", False),
    ("if possible, ", "", False), ("could I get you to ", "", True), ("do you think you could ", "", True), ("I want you to ", "", False),
    ("", " right away", False), ("", ", thank you", False), ("", " when you get a chance", False), ("help me out and ", "", False),
    ("it would be great if you could ", "", False), ("listen, ", "", False), ("quick, ", "", False), ("when you have a second, ", "", False),
    ("would it be possible to ", "", True), ("are you able to ", "", True), ("", ", will you", True), ("well, ", "", False), ("just ", "", False),
)  # fmt: skip

EVERYDAY = """acorn actor album almond amber angel ankle antler apron arch arrow artist aspen atlas aunt autumn avocado
    badge bagpipe ballad bamboo banner barley barrel basil basket beacon beaver beetle bench berry bicycle birch
    biscuit blossom blueberry boat bonnet bottle boulder bracelet branch brass brick bronze brook broom brush
    bubble bucket buckle buffalo bugle bunny butter button cabin cable cactus camel canal candy cannon canoe
    canvas caramel cardigan carpet carrot castle caterpillar cello cement chalk champion charm cheese cherry
    chestnut chimney chocolate cinnamon circus citrus clay cliff clover coach coast cobble cobra coconut collar
    comet compass concert copper coral corner cotton cougar counter crayon cream creek cricket crown cucumber
    cupboard curry curtain cushion dagger daisy dancer decade deer delta desert diary dinosaur dolphin domino
    donkey dragon drawer drummer duckling eagle earring earth easel eclipse elbow elephant ember envelope
    evening fabric fairy falcon farmer fence fern fiddle field finger firefly flame flannel flask flute fountain
    fox frost fudge funnel galaxy garlic gazelle geyser giraffe glacier glider globe goose granite grape gravel
    grove guitar gypsum hammer hammock hamster harbor hazel hedge helmet heron hickory hill hockey honey hoop
    horizon hornet hotel husky iceberg igloo indigo ink insect iron jacket jaguar jelly jewel jigsaw jungle
    kitten koala ladybug lagoon lamp lantern lavender leather lemonade leopard lettuce lilac lily lime linen
    lizard lobster locket lotus lumber lunch lynx magnolia mango mansion maple marsh melon mermaid meteor mint
    mitten moccasin monkey moose mosaic moth motor mountain mouse muffler mustard napkin needle nest nickel
    noodle notebook nutmeg oak oasis oat octopus olive onion opal opera orange orchard organ otter oven owl
    oyster palace panda panther papaya parade parsley pasture patio peach peacock peanut pearl pelican pencil
    penguin pepper perfume petal piano pickle pigeon pillow pine pirate planet plaza plum pocket poem pony
    poplar poppy porch potter prairie pretzel prism pudding pumpkin puppet pyramid quail quarry quartz quilt
    rabbit raccoon radish raft rainbow raisin raspberry raven reef rocket rooster rope rose ruby saddle saffron
    sailor salad sandal sapphire saxophone schooner seagull seal shamrock shark shell shepherd shield shovel
    silk skater sled slipper snail snow soap sparrow spice spider spinach spiral sponge spruce squirrel stable
    stadium statue storm stream sugar sunflower surf swallow sweater sword syrup tango tapestry teacup temple
    thimble throne ticket timber toast tomato topaz torch tortoise tower tractor trail trumpet tulip tundra
    tunnel turnip turtle umbrella unicorn vanilla vase velvet village vine violet volcano wagon walnut walrus
    waterfall weasel whale wheat whistle willow wizard wolf wombat wood wool yacht yogurt zebra zephyr zinnia
    brave bright broad calm careful cheerful clever cloudy cold cool cozy crisp curious deep eager early elegant
    empty fancy fast fierce fluffy foggy friendly gentle giant glad golden grand heavy honest huge humble icy
    jolly kind lazy light lively loud lucky mellow mighty misty modern narrow neat noisy odd old patient pink
    plain polite proud quick rapid rare rich rough round royal salty shiny short shy silky simple sleek slow
    smooth soft solid spare spicy square steady steep strong sturdy swift tall tidy tough tropical vast vivid
    warm wet wide wise witty young zesty""".split()
NAMES = """Aaron Abel Ada Adele Agnes Aldo Alexa Alfred Alma Alvin Amelia Amos Andre Angela Anita Antonio April Archie
    Ariel Arlo Arthur Audrey August Austin Ava Barbara Basil Becky Benita Bert Betty Blake Bonnie Bradley
    Brandon Bridget Bryce Caleb Calvin Cameron Candice Carmen Carol Caspar Cecil Celia Chad Charlotte Chloe
    Chris Cindy Claire Clement Clyde Cody Connor Cora Corey Craig Cynthia Daisy Dale Damian Daniel Darcy Darren
    Dawn Dean Debbie Delia Dennis Desmond Diane Dominic Donald Donna Dora Doris Dorothy Duncan Dwight Earl Eddie
    Edgar Edna Edwin Eileen Elaine Eleanor Eli Elise Eliza Ella Ellen Elsa Emil Emily Eric Erica Erin Ernest Eva
    Evan Evelyn Faith Fay Ferdinand Flynn Francis Freddie Gabriel Gail Gary Georgia Gerald Gilbert Gina Gladys
    Glenn Gordon Graham Gwen Hank Harold Harry Hazel Heather Heidi Herbert Hilda Howard Hugh Hugo Ian Ida Ingrid
    Irene Irving Isaac Ivy Jack Jackie Jade Jake Janet Jared Jason Jay Jean Jeffrey Jeremy Jesse Jessica Jill
    Jim Joan Joel John Jordan Josephine Joy Joyce Juan Judith June Justin Karl Kate Kayla Kelly Kenneth Kent
    Kerry Kim Kirk Kyle Lance Larry Laurence Leah Leon Leonard Leroy Leslie Lewis Lillian Linda Lloyd Lois Lola
    Louis Louise Lucas Lucia Luke Luther Lydia Mabel Maggie Malcolm Marc Marcia Margaret Marie Marion Marjorie
    Mark Martha Martin Marvin Mary Matilda Maurice Megan Melanie Melvin Mercedes Michael Mildred Miles Millie
    Milton Minnie Molly Monica Muriel Myra Nancy Natalie Neil Nell Nicholas Nicole Noel Norman Olga Oliver Opal
    Oswald Pablo Pamela Patrick Paul Pauline Pearl Percy Perry Philip Phyllis Polly Preston Ralph Ramona Randall
    Raymond Rebecca Regina Rex Rhoda Richard Robert Robin Rodney Roger Roland Ronald Rosalie Ross Roy Ruby
    Rudolph Rufus Russell Ruth Ryan Sabrina Sally Samantha Sandra Scott Sean Seth Shane Sharon Sheila Shirley
    Sidney Silas Spencer Stanley Stuart Susan Tabitha Tamara Ted Terry Thelma Thomas Tiffany Timothy Toby Todd
    Tony Tracy Travis Troy Ulrich Vanessa Veronica Vince Viola Violet Virgil Vivian Wade Warren Wayne Wilbur
    Will Winston Xavier Yvette Yvonne Abbott Archer Atkins Bailey Barker Barnes Bates Becker Bell Bennett Berg
    Bishop Blair Boyd Brooks Bryant Burke Burns Butler Byrne Campbell Carson Carter Casey Chambers Chapman Cohen
    Cole Cooper Costa Crawford Cross Curry Dalton Daniels Dawson Dixon Drake Duffy Dunn Eaton Emerson Farrell
    Ferrari Fields Fleming Flores Ford Fowler Fraser Freeman Fuller Gallagher Gibson Gomez Griffin Hale Hamilton
    Hansen Harper Harrison Hart Hayes Holmes Horton Howell Hudson Hunter Ingram Jackson Jarvis Jenkins Kane Kemp
    Kennedy Knight Lambert Lawson Logan Lowe Lynch Marsh Mason Mendez Mercer Mitchell Monroe Moore Morris
    Morrison Murphy Newman Nichols Norris Novotny Obrien Ortega Owens Page Palmer Pearson Perkins Peterson
    Pierce Porter Powell Price Quinn Ramirez Reed Reilly Rhodes Richards Riley Rivera Robbins Rogers Rowe Russo
    Ryder Sanders Santos Sawyer Sharp Shaw Shelton Sherman Sloan Snyder Sparks Stanton Steele Stone Sutton
    Swanson Takeda Tate Taylor Thorpe Torres Townsend Tucker Tyler Underwood Valdez Vaughn Wagner Wallace Walsh
    Warner Watkins Weaver Webb Wheeler Wilcox Winters Wolfe Woodard Wright Yates Zimmerman""".split()
# Words of the tokenizer's vocabulary that stand in ordinary documentation, without those of holdout and ood.
LEXICON = (Path(__file__).parent / "lexicon.txt").read_text(encoding="utf-8").split()
# Words and names that the tokenizer cuts one way after a space and another way after a quotation mark.
SPELLING = (Path(__file__).parent / "spelling.txt").read_text(encoding="utf-8").split()
