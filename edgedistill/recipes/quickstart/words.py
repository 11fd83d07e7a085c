"""Hold the word lists of the quickstart task, apart for train and for holdout, and the way to draw from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from edgedistill.recipes.quickstart.drills import EVERYDAY, LEXICON, NAMES

T = TypeVar("T")


class Chooser:
    """Draw from sequences with `random.Random.random()` only: the one method whose sequence Python promises to keep."""

    def __init__(self, seed: int, *, invents: bool = False) -> None:
        self._random = random.Random(seed)
        self.invents = invents  # most of the words that pools give are others, some of them made up

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def below(self, n: int) -> int:
        return int(self._random.random() * n)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def another(self, word: str) -> str:
        """Take another word of the same case, or make one up; short words and numbers stay."""
        if len(word) < 4 or not word.isalpha():
            return word
        way = self.below(20)
        if way < 4:
            made = "".join(self.pick(SYLLABLES) for _ in range(2 + self.below(2)))
        elif way < 7:
            made = self.pick(EVERYDAY)
        else:
            made = self.pick(NAMES if word[0].isupper() and way < 12 else LEXICON)
        return made.capitalize() if word[0].isupper() else made

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


SYLLABLES = """ba be bran cal cor da del dor el fen fi gal gor ha hel ka kel kin la len lo mar mel mi mon na nel nor or
    pa pel pi ra rin ros sal sen so tal tan ter tor va ven vi wen wil yor za""".split()


class Pool:
    """Keep the words for train and for holdout apart; commas separate entries."""

    def __init__(self, train: str, holdout: str) -> None:
        self.halves = {"train": self._split(train), "holdout": self._split(holdout)}
        both = set(self.halves["train"]) & set(self.halves["holdout"])
        if both:
            raise ValueError(f"a pool shares {sorted(both)} between train and holdout")

    @staticmethod
    def _split(words: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(" ".join(w.split()) for w in words.split(",") if w.strip()))

    def pick(self, c: Chooser, half: str) -> str:
        entry = c.pick(self.halves[half])
        return " ".join(map(c.another, entry.split(" "))) if c.invents and c.chance(0.8) else entry


FIRST = Pool(
    """Anna, Ben, Carla, David, Elena, Frank, Grace, Hassan, Ines, Jonas, Karen, Liam, Maria, Nadia, Oscar, Priya,
    Quinn, Rosa, Samuel, Tara, Umar, Vera, Walter, Yusuf, Zoe, Aiden, Bianca, Chen, Diego, Emma, Farah, George,
    Hannah, Ivan, Julia, Kofi, Laura, Marcus, Noah, Olivia, Pedro, Rachel, Stefan, Teresa, Victor, Wendy,
    Ximena, Yara, Zach, Amir, Brenda, Colin, Dana, Ethan, Fiona, Gustavo, Helen, Igor, Joanna, Kevin, Lucy,
    Mateo, Nina, Owen, Paula, Ravi, Sofia, Tom, Ursula, Vincent, Wanda, Aisha, Boris, Cleo, Derek, Esther,
    Felix, Gloria, Henry, Isabel, Jacob, Kira, Leo, Mona, Nathan, Omar, Petra, Rita, Simon, Tina, Viktor, Alice,
    Bruno, Cathy, Dylan, Erik, Flora, Greg, Holly, Ismael, Jenny, Kurt, Lena, Max, Nora, Otto, Peter, Rob, Sara,
    Theo""",
    """Abigail, Bernard, Camille, Dmitri, Edith, Fatima, Gavin, Harriet, Imran, Jasmine, Keith, Leila, Morgan, Naomi,
    Orlando, Phoebe, Rashid, Sylvia, Trevor, Una, Valerie, Wesley, Yolanda, Adrian, Beatrice, Curtis, Daphne,
    Elliot, Gemma, Hector, Iris, Jerome, Kathleen, Lorenzo, Miriam, Nigel, Penelope, Ronan, Stella, Tobias""",
)
LAST = Pool(
    """Lopez, Miller, Schmidt, Okafor, Tanaka, Novak, Rossi, Kim, Patel, Jensen, Brown, Garcia, Haddad, Ivanov, Clark,
    Dubois, Evans, Fischer, Gupta, Hughes, Johnson, Keller, Larsen, Moreno, Nguyen, Olsen, Parker, Quist, Reyes,
    Silva, Turner, Usman, Vargas, Walker, Young, Zhang, Adams, Baker, Cohen, Diaz, Ellis, Foster, Grant, Hill,
    Ito, James, Khan, Lee, Meyer, Nelson""",
    """Ashworth, Bellini, Carvalho, Doyle, Eriksen, Falk, Goldberg, Hoffman, Iqbal, Jankowski, Kowalski, Lindqvist,
    Mbeki, Nakamura, Osborne, Petrov, Quigley, Romero, Sandoval, Thornton""",
)
KIN = Pool("Mum, Dad, Grandma, Aunt Clara, Uncle Joe, Mom, Cousin Tim", "Grandpa, Auntie Pam, Uncle Ray, Cousin Beth")
TITLED = Pool("Doctor, Coach", "Professor, Pastor")

PLACE_NAME = Pool(
    """Riverside, Oakwood, Central, Harbor, Maple, Sunset, Lakeview, Northgate, Greenfield, Hillcrest, Silver,
    Westwood, Union, Liberty, Garden, Kings, Stonebridge, Meadow, Brookside, Willow, Cedar, Eastside, Fairview,
    Highland, Victoria, Parkway, Pine Ridge, Rosewood, Summit, Valley, Windmill, Orchard, Castle, Mill, Forest,
    Chapel, Copper, Falcon, Granite, Juniper""",
    """Ashford, Birchwood, Clearwater, Dockside, Elmhurst, Foxglove, Glenwood, Hawthorn, Ironbridge, Kingfisher,
    Larkspur, Moorland, Nightingale, Oxbow, Pebble, Queensway, Redwood, Sycamore, Thistle, Wharf""",
)
PLACE_KIND = Pool(
    """Museum, Mall, Station, Hospital, Library, Park, Bakery, Hotel, Cafe, School, Stadium, Theater, Gym, Market,
    Clinic, Pharmacy, Airport, Diner, Church, Garage""",
    "Gallery, Arena, Brewery, Aquarium, Cinema, College, Marina, Bookshop, Pizzeria",
)
STREET_KIND = Pool("Street, Road, Avenue, Lane", "Drive, Boulevard, Court")
CITY = Pool(
    """Paris, London, Berlin, Madrid, Rome, Vienna, Oslo, Dublin, Lisbon, Prague, Chicago, Boston, Denver, Seattle,
    Austin, Miami, Toronto, Vancouver, Montreal, Tokyo, Osaka, Seoul, Beijing, Delhi, Mumbai, Cairo, Lagos,
    Nairobi, Sydney, Melbourne, Auckland, Lima, Bogota, Santiago, Mexico City, Havana, Atlanta, Dallas, Houston,
    Phoenix, Portland, San Diego, New York, Detroit, Philadelphia, Nashville, Orlando, Tampa, Cleveland,
    Milwaukee, Munich, Hamburg, Cologne, Frankfurt, Zurich, Geneva, Milan, Naples, Venice, Turin, Barcelona,
    Seville, Valencia, Porto, Athens, Istanbul, Ankara, Warsaw, Krakow, Budapest, Bucharest, Sofia, Belgrade,
    Zagreb, Stockholm, Helsinki, Copenhagen, Brussels, Amsterdam, Rotterdam, Glasgow, Manchester, Liverpool,
    Leeds, Bristol, Cardiff, Belfast, Galway, Cork, Bath, York, Oxford, Cambridge, Nice, Lyon, Bordeaux, Lille,
    Dubai, Doha""",
    """Marseille, Edinburgh, Aberdeen, Norwich, Brighton, Gothenburg, Bergen, Tallinn, Riga, Vilnius, Salzburg,
    Innsbruck, Leipzig, Dresden, Stuttgart, Florence, Bologna, Palermo, Granada, Bilbao, Memphis, Tucson, Omaha,
    Boise, Savannah, Pittsburgh, Sacramento, Calgary, Ottawa, Winnipeg, Kyoto, Hanoi, Bangkok, Jakarta, Perth,
    Adelaide, Casablanca, Accra, Quito, Montevideo""",
)
TOWN_FIRST = Pool("Lake, Port, Mount, North, South, Fort, New, Saint", "Upper, Cape, Glen, Little")
TOWN = Pool(
    """Marlow, Harlan, Bexley, Tilden, Corwin, Dunmore, Elgin, Farley, Gatesby, Holden, Jasper, Kendal, Lorne, Milford,
    Newell, Orson, Preston, Radley, Selby, Tarrant, Vernon, Weston, Alton, Barlow""",
    "Ainsley, Burnham, Croft, Danby, Easton, Fulmer, Garrick, Hadley, Kirby, Langdon, Merrow, Norbury",
)
TITLE_ADJ = Pool(
    """Golden, Broken, Midnight, Silent, Electric, Lonely, Crimson, Hollow, Wild, Paper, Velvet, Distant, Burning,
    Frozen, Gentle, Secret, Summer, Winter, Neon, Sweet, Restless, Blue, Lost, Early, Heavy, Plastic, Sleepy,
    Sunny, Tender, Yellow""",
    """Scarlet, Crystal, Dusty, Emerald, Fading, Hidden, Ivory, Lunar, Marble, Northern, Pale, Quiet, Rusty, Sacred,
    Wooden""",
)
TITLE_NOUN = Pool(
    """River, Heart, Road, Sky, Fire, Dream, Mirror, Garden, Train, Window, Ocean, Shadow, Star, City, Letter, Bird,
    Song, Rain, Door, Moon, Island, Bridge, Horse, Kingdom, Lantern, Morning, Mountain, Radio, Thunder, Valley""",
    """Anchor, Balloon, Canyon, Diamond, Engine, Feather, Harvest, Lullaby, Meadow, Orchid, Puzzle, Ribbon, Satellite,
    Tiger, Voyage""",
)
BAND = Pool(
    """Foxes, Wanderers, Pilots, Strangers, Brothers, Owls, Dancers, Rockets, Sailors, Poets, Echoes, Drifters, Lions,
    Runaways, Giants, Sisters, Wolves, Cowboys, Robots, Swans""",
    "Badgers, Comets, Dreamers, Falcons, Ghosts, Miners, Nomads, Otters, Saints, Vandals",
)
TOPIC = Pool(
    """budget, project, team, design, sales, piano, swimming, yoga, dentist, parents, book club, marketing, chess,
    guitar, garden, spanish, tax, safety, product, pottery, hiring, dance, football, quarterly, travel, family,
    choir, tennis, roof, car""",
    """robotics, violin, karate, mortgage, webinar, archery, harvest, compliance, poetry, drama, eyesight, ballet,
    rowing, logo, french""",
)
MEETING = Pool(
    "meeting, review, lesson, appointment, practice, call, workshop, dinner, class, check, party",
    "rehearsal, briefing, consultation, tutorial, tasting, session, inspection",
)
ACTIVITY = Pool(
    "lunch, coffee, dinner, brunch, drinks, a walk, a run, tennis, golf, shopping, study time, movie night",
    "breakfast, bowling, karaoke, a picnic, badminton, supper, a hike",
)
LABEL = Pool(
    """gym, school run, morning run, medication, yoga, work, feeding the dog, airport taxi, watering the plants, team
    call, exam, night shift, prayer, fishing trip, church, piano lesson, breakfast, the early train, baby
    bottle, swim practice, trash day, vitamins, meditation, walking the dog, homework, bakery shift, road trip,
    dentist, study group, parcel delivery, bus, laundry, rent payment, blood test, soccer practice, farmers
    market, book club, cat food, stretching, language class""",
    """rowing practice, insulin, sunrise hike, job interview, choir rehearsal, ferry, feeding the parrot, court
    hearing, eye drops, football final, mock exam, garbage pickup, milking the goats, tax deadline, camp
    check-in, the night bus""",
)
COOKING = Pool(
    """pasta, egg, laundry, pizza, rice, tea, cake, bread, nap, workout, chicken, cookie, potato, soup, study, oven,
    parking, sauna, plank, roast, lasagna, dryer, sprinkler, homework, meditation, dough, steak, turkey, noodle,
    reading""",
    "quinoa, muffin, salmon, lentil, brownie, dishwasher, charcoal, hair mask, crumpet, stew, puzzle, grill",
)
LIST_NAME = Pool(
    """shopping, grocery, packing, to-do, reading, wish, gift, chores, camping, party, hardware, movie, travel,
    birthday, cleaning, pharmacy, holiday, work, garden, school""",
    "errands, picnic, baking, wedding, moving, repair, festival, breakfast, renovation",
)
COUNT = Pool("two, three, four, six, a dozen, some, extra, nine, more", "five, seven, eight, eleven, several")
FOOD_ADJ = Pool("fresh, frozen, organic, sliced, dried, ripe, cheap, local", "smoked, tinned, crunchy, pickled")
FOOD = Pool(
    """lemons, apples, tomatoes, onions, eggs, bananas, pears, carrots, peppers, sausages, potatoes, bagels, mushrooms,
    cookies, grapes, beans, oranges, bread rolls, cherries, pancakes""",
    "apricots, pretzels, radishes, walnuts, olives, figs, crackers, beets",
)
GOODS_ADJ = Pool(
    "large, small, red, green, new, spare, brown, blue, plain, cheap", "purple, waterproof, wooden, tiny, grey"
)
GOODS = Pool(
    """towels, batteries, candles, socks, napkins, light bulbs, screws, envelopes, blankets, notebooks, plates, cups,
    sponges, gloves, ropes, folders, stamps, paper bags, pens, paintbrushes""",
    "hooks, ribbons, magnets, lanterns, sandals, pegs, marbles, cushions",
)
PORTABLE = Pool(
    """spare key, laptop, umbrella, ticket, suitcase, camera, passport, ladder, blue folder, phone charger, guitar, red
    jacket, tent, dog leash, contract, toolbox, parking permit, tablet, backpack, flash drive""",
    "violin, receipt, telescope, gate remote, silver necklace, chess set, invoice, rice cooker, harmonica, paddle",
)
FIXED = Pool(
    """car, printer, garage door, heater, bike, front door, washing machine, kitchen sink, projector, sofa, coffee
    maker, elevator, oven, shower, doorbell""",
    "boiler, lawn mower, kayak, attic window, stroller, aquarium, dishwasher, treadmill",
)
CODED = Pool(
    "garage, alarm, locker, front door, bike lock, suitcase, laptop, office, gym, parking, basement, storage",
    "boiler room, elevator, gate, safe, cellar, marina",
)
SPOT = Pool(
    """kitchen, garage, hallway, office, basement, top drawer, bedroom, trunk, locker, closet, back yard, living room,
    reception, bathroom, mailbox""",
    "attic, pantry, shed, glove box, cellar, cloakroom, greenhouse, filing cabinet",
)
STATE = Pool(
    "broken, too loud, fixed, on sale, too old, clean, paid for, not working, almost new, dirty, too small",
    "leaking, rusty, overdue, sold out, blocked, wobbly, repaired",
)
NEWS = Pool(
    """I'm on my way, the meeting moved to the big room, dinner is almost done, I forgot my wallet, we won the game,
    the kids are asleep, I'll call back after lunch, the train is delayed, I can't make it tonight, practice is
    cancelled, I found a good plumber, we need more chairs, my phone is about to die, the doctor said everything
    is fine, I got the job, the neighbors are having a party, I left the lights on, the soup needs more salt,
    I'm stuck in traffic, the wifi password has changed, we are out of coffee, I parked behind the church, the
    plane just landed, the store closes early, I'm waiting outside, the bus never came""",
    """I missed the last ferry, the puppy ate my shoe, our table is by the window, the exam went really well, the
    elevator is out of order, I booked the cottage, the babysitter is sick, my flight got cancelled, the choir
    sounds great, we ran out of paint, the tow truck is here, I finally finished the puzzle""",
)
WORDS = Pool(
    """thanks for the flowers, see you at the concert, pick me up at the corner, congratulations on the new house,
    bring a warm coat, good luck today, happy birthday, have a safe trip""",
    "happy anniversary to you both, save me a slice of pie, wear something green, enjoy the honeymoon",
)
IDEA = Pool(
    """try the new bakery, paint the fence, learn to juggle, cancel the gym membership, ask for a refund, renew the
    insurance, change the oil, back up the photos, plant more tulips, compare phone plans, write a thank you
    card, clean the gutters, visit the science museum, bake bread more often, check the smoke alarm, sell the
    old desk, frame the wedding photo, return the library books, start a podcast, water the ferns twice a week""",
    """defrost the freezer, sharpen the knives, call the landlord back, knit a scarf, rotate the tires, descale the
    kettle, borrow a trailer, dust the bookshelf, tune the harp, join the rowing club""",
)
