"""List the words that generated texts are made of; no two lists share one."""


def _list(text: str, separator: str | None = None) -> list[str]:
    return [part.strip() for part in text.split(separator)]


ADJECTIVES = _list(
    "old quiet green narrow bright cold heavy early broken gentle silver distant hollow warm empty plain"
)

NOUNS = _list("""
    river farmer window garden teacher train letter mountain bridge market sailor kitchen lamp forest village doctor
    carpet engine harbour painter
""")

VERBS = _list("watched followed remembered crossed repaired described left found carried painted visited measured")

PLACES = _list(
    """
    before the rain came; after the long winter; near the edge of the town; on the way to the sea; in the afternoon;
    behind the mill; without saying a word; for the second time; under the evening sky; as if nothing had happened
    """,
    ";",
)

#: Keys that numbers belong to.
KEYS = _list("""
    amber basil cedar copper coral daisy ember falcon ginger hazel indigo ivory jasper juniper lemon lotus maple marble
    nutmeg olive onyx opal pepper poppy quartz raven saffron tulip velvet willow
""")

#: Words that lists are made of.
LISTED = _list("""
    anchor apron arrow badge barrel basket beacon blanket bottle bucket button cabin candle canvas carton castle chapel
    circle cobweb collar compass cotton cradle cushion dagger desert dragon drawer feather fiddle flagon flower fountain
    goblet hammer hamper helmet insect island jacket kettle ladder lantern locket magnet mirror mitten needle oyster
    paddle parcel pebble pencil pillow planet pocket ribbon rocket saddle shovel spider statue temple thimble ticket
    tunnel turnip violin wagon whistle
""")
