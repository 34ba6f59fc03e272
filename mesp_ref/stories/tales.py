"""The grammar of the stories: animals that lose things, rescue, bake, travel, wonder and race.

What follows from an earlier word stands in a table beside it, so a reader can foresee it: a name
decides he or she, a place its preposition, a trouble the tool that helps, a deed the noise it makes.
"""

from mesp_ref.stories.grammar import Grammar

_GIRLS = ("Mila", "Ruby", "Hazel", "Nora", "Poppy", "Tilda", "Wren", "Ivy")
_BOYS = ("Otto", "Felix", "Bruno", "Jasper", "Theo", "Finn", "Oscar", "Hugo")

_PLACES = {
    "garden": "in", "forest": "in", "meadow": "in", "orchard": "in", "library": "in",
    "hill": "on", "beach": "on", "river": "by", "lake": "by", "pond": "by", "market": "at",
    "harbour": "at", "bridge": "under", "oak": "under", "barn": "behind", "school": "behind",
}  # fmt: skip

_TOOLS = {
    "in a deep well": "a long rope",
    "on a high branch": "a tall ladder",
    "in the thick mud": "a wide plank",
    "under a fallen log": "a strong pole",
    "behind a locked gate": "an iron key",
    "in a dark cave": "a bright lamp",
    "on a rock in the stream": "a small boat",
    "in a thorny bush": "a pair of shears",
}

_INGREDIENTS = {
    "plum cake": "plums", "cherry pie": "cherries", "lemon cake": "lemons", "nut cake": "nuts",
    "pumpkin pie": "pumpkins", "carrot cake": "carrots", "berry tart": "berries",
    "pear tart": "pears",
}  # fmt: skip

_DEEDS = {
    "sing me a song": "sang a song",
    "tell me a riddle": "told a riddle",
    "mend my fence": "mended the fence",
    "paint my door": "painted the door",
    "feed my hens": "fed the hens",
    "sweep my floor": "swept the floor",
    "carry my sacks": "carried the sacks",
    "water my roses": "watered the roses",
}

_NOISES = {
    "playing the flute": "a thin whistling",
    "building a raft": "a loud hammering",
    "snoring in the hay": "a deep rumbling",
    "learning to sing": "a strange howling",
    "digging for gold": "a dull thumping",
    "beating an old drum": "a steady booming",
    "dancing in wooden shoes": "a fast clattering",
    "sawing wood for a sled": "a rough scratching",
}

_WORDS = {
    "name": _GIRLS + _BOYS,
    "kind": (
        "fox", "rabbit", "mouse", "bear", "hedgehog", "badger", "squirrel", "goose",
        "frog", "cat", "duck", "mole", "goat", "turtle", "pony", "beaver",
    ),
    "trait": (
        "small", "brave", "shy", "clever", "cheerful", "curious", "quiet", "gentle", "proud",
        "friendly", "stubborn", "lazy",
    ),
    "home": (
        "hollow tree", "little cottage", "cosy burrow", "stone tower", "wooden hut",
        "blue houseboat", "crooked house", "snug cabin",
    ),
    "place": tuple(_PLACES),
    "weather": ("sunny", "windy", "rainy", "foggy", "snowy", "cloudy", "frosty", "warm"),
    "time": ("morning", "afternoon", "evening", "day"),
    "colour": ("red", "blue", "green", "yellow", "purple", "white", "black", "silver"),
    "thing": (
        "kite", "hat", "scarf", "drum", "ball", "whistle", "bell", "blanket", "teapot", "basket",
        "mitten", "marble",
    ),
    "mood": ("sad", "worried", "upset", "gloomy"),
    "find": (
        "an empty nest", "a rusty nail", "three acorns", "a broken cup", "a grey feather",
        "an old boot", "a smooth stone", "a torn sail",
    ),
    "food": (
        "a jar of jam", "a slice of cake", "a bowl of soup", "a bag of nuts",
        "a loaf of warm bread", "a handful of berries", "a cup of cocoa", "a plate of pancakes",
    ),
    "trouble": tuple(_TOOLS),
    "dish": tuple(_INGREDIENTS),
    "deed": tuple(_DEEDS),
    "storm": ("heavy rain", "thick fog", "deep snow", "a wild storm"),
    "shelter": ("an empty shed", "a dry cave", "an old mill", "a hollow log"),
    "doing": tuple(_NOISES),
    "light": ("a candle", "a lamp", "a torch", "a jar of fireflies"),
    "best": ("fastest", "strongest", "bravest", "cleverest"),
    "mishap": (
        "dropped a sack of apples", "lost a shoe", "spilled a pail of milk", "twisted a foot",
    ),
}  # fmt: skip

_SHARED = {
    "story": (
        "<opening> <lost> <ending>",
        "<opening> <rescue> <ending>",
        "<opening> <feast> <ending>",
        "<opening> <journey> <ending>",
        "<opening> <noise> <ending>",
        "<opening> <race> <ending>",
    ),
    "opening": (
        "Once upon a time, there was a {trait} {kind} named {name}. {name.He} lived in a {home}.",
        "There once was a {trait} {kind} called {name}, who lived in a {home}.",
        "In a {home} lived a {trait} {kind}. {name} was {name.his} name.",
        "Far away, in a {home}, there lived a {trait} {kind} by the name of {name}.",
    ),
    "ending": (
        "From that day on, {name} and {name2} were the best of friends.",
        "That night, {name} slept very well in the {home}.",
        "And whenever {name} came past the {place}, {name.he} had to smile.",
        "{name} went home to the {home}, tired but happy.",
        "Every animal in the land heard of it, and they still tell the tale of {name} and {name2}.",
        "It was a day that {name} and {name2} would never forget.",
    ),
    "joy": (
        "danced in a circle",
        "jumped up and down",
        "laughed out loud",
        "sang at the top of {name.his} voice",
    ),
}

_PLOTS = {
    "lost": (
        "One {weather} {time}, {name} could not find {name.his} {thing}. The {thing} was {colour}, "
        "and {name} loved it. <search> <visitor> <clue> They went to the {place} together, but all "
        'they found {place.at} was {find}. {name2} had an idea. "Let us try the {place2}!" And '
        "there was the {thing}, {place2.at}! {name} was so happy that {name.he} <joy>. To say thank "
        "you, {name.he} gave {name2} {food}.",
    ),
    "search": (
        "{name.He} looked for the {thing} under the bed and behind the stove.",
        "The {thing} was not on the shelf, and {name} felt very {mood}.",
    ),
    "visitor": (
        "Just then, {name.his} friend {name2} the {kind2} came to visit.",
        "A {kind2} named {name2} came by and stopped.",
    ),
    "clue": (
        '"Where did you last see the {thing}?" asked {name2}. "I was playing {place.at}," said {name}.',
        '"What are you looking for?" asked {name2}. "My {thing}! I think I left it {place.at}."',
    ),
    "rescue": (
        "One {weather} {time}, {name} was walking {place.at} when {name.he} heard a cry. "
        '"Help! Help!" It was {name2} the {kind2}, who was stuck {trouble}. <promise> {name.He} '
        "ran to {name3} the {kind3}, who lived near the {place2}. <lend> In the end, {name2} was free "
        "again. <thanks>",
    ),
    "promise": (
        '"Do not be afraid," said {name}. "I will get {trouble.tool}."',
        '"Who is there?" called {name}. "Wait for me, I only need {trouble.tool}!"',
    ),
    "lend": (
        '"What do you need it for?" asked {name3}. "{name2} is stuck {trouble}," said {name}, '
        "and {name3} gave {name.him} {trouble.tool}.",
        "{name3} had {trouble.tool} and was glad to help.",
    ),
    "thanks": (
        '"You saved me!" said {name2} and gave {name} {food}.',
        '"I will not forget this as long as I live," said {name2}.',
        "{name2} hugged {name} and called {name.him} the best friend in the land.",
    ),
    "feast": (
        "It was the birthday of {name2} the {kind2}, and {name} wanted to make a {dish}. But there "
        "were no {dish.needs} left in the {home}. So on a {weather} {time}, {name.he} went to "
        "{name3}, a {trait2} {kind3} who had a little shop {place.at}. <bargain> So {name} "
        "{deed.did}, and then {name.he} had all the {dish.needs} {name.he} needed. <party>",
    ),
    "bargain": (
        '"May I have some {dish.needs}?" asked {name}. "Yes," said {name3}, "if you {deed}."',
        '"Who wants my {dish.needs}?" asked {name3}. "They are for {name2}," said {name}. '
        '"Then you must {deed}."',
    ),
    "party": (
        "In the evening, {name2} ate three pieces of the {dish} and wished for another one.",
        '"What is this?" asked {name2}. "A {dish}, and it is all for you!" {name2} had never been '
        "so happy.",
    ),
    "journey": (
        "One {time}, {name} packed a {thing} and set out for the {place}, where {name2} the {kind2} "
        "lived. The {thing} was {colour}, and it was for {name2}. On the way, {storm} came over the "
        "land, and {name} hid in {shelter}. Inside sat {name3}, a {trait2} {kind3}, who was cold and "
        "hungry. <share> When the sky was clear again, {name3} showed {name.him} the way. "
        '"Where have you been?" asked {name2}. "I met {name3} in {shelter}," said {name}. <present>',
    ),
    "share": (
        "{name} had {food} and gave half of it to {name3}.",
        '"I can give you {food}," said {name}, and {name3} ate it all.',
    ),
    "present": (
        "Then {name.he} gave {name2} the {thing}, and {name2} liked it very much.",
        "The {thing} was just what {name2} had always wanted.",
    ),
    "noise": (
        "Every {time}, {doing.noise} came from the {place}, and nobody knew who it was. "
        '<fear> But {name} took {light} and went to look. "Who is there?" {name.he} asked. It was '
        "only {name2}, a {trait2} {kind2}, who was {doing} {place.at}! <reason> {name} <joy> and "
        "told {name3} the {kind3} about it. The next day they all met {place2.at} and laughed, for "
        "{name2} was {doing} again.",
    ),
    "fear": (
        '"It must be a monster," said {name3}.',
        "{name3} was so afraid that {name3.he} hid under a {colour} blanket.",
    ),
    "reason": (
        '"Why do you hide?" asked {name}. "I thought that you would laugh at me."',
        '"Please do not be angry," said {name2}. "I did not want to wake you."',
    ),
    "race": (
        "One {weather} {time}, {name} and {name2} the {kind2} could not agree who was the {best}. "
        '"Let us run to the {place}! The first one gets {food}," said {name2}. On the way, near the '
        "{place2}, {name} saw {name3}, a {trait2} {kind3}, who had {mishap}. <stop> {name2} "
        "got there first and won {food}. <fair>",
    ),
    "stop": (
        '{name} stopped at once. "I will help you," {name.he} said.',
        '"Can you help me?" asked {name3}, and {name} did.',
    ),
    "fair": (
        '"You may be the {best}, {name2}," said {name3}, "but {name} is the kindest."',
        'But {name2} saw what {name} had done. "You take half," {name2.he} said.',
    ),
}

_ATTRIBUTES = {
    "he": dict.fromkeys(_GIRLS, "she") | dict.fromkeys(_BOYS, "he"),
    "him": dict.fromkeys(_GIRLS, "her") | dict.fromkeys(_BOYS, "him"),
    "his": dict.fromkeys(_GIRLS, "her") | dict.fromkeys(_BOYS, "his"),
    "at": {place: f"{where} the {place}" for place, where in _PLACES.items()},
    "tool": _TOOLS,
    "needs": _INGREDIENTS,
    "did": _DEEDS,
    "noise": _NOISES,
}

TALES = Grammar(_WORDS | _SHARED | _PLOTS, _ATTRIBUTES)
