"""Video prompts with their nouns (/n) and verbs (/v) marked by hand.

Verbs are those with a meaning of their own, -ing forms before a noun among them ("a running dog"), not be, have, do
and the like. An -ed form before a noun is an adjective. The rules were made with the first half in sight and not the
second.
"""

SEEN = """
a red circle/n moving/v left and a blue square/n moving/v right
a cat/n chases/v a dog/n through the garden/n
two dogs/n running/v on a sandy beach/n at sunset/n
a man/n in a black suit/n walks/v slowly down the street/n
an old woman/n is feeding/v pigeons/n in the park/n
a drone/n shot/n of waves/n crashing/v against rocky cliffs/n
a close-up/n of a bee/n landing/v on a yellow flower/n
three boats/n float/v on a calm lake/n
a panda/n playing/v the guitar/n by a campfire/n
the camera/n zooms/v in on a melting/v ice/n cream/n cone/n
a young girl/n with long hair/n blows/v out the candles/n on a birthday/n cake/n
a train/n passes/v through snowy mountains/n while the sun/n rises/v
an astronaut/n riding/v a horse/n on the moon/n, cinematic lighting/n
a hot air/n balloon/n drifts/v over a green valley/n
a chef/n chops/v fresh vegetables/n and puts/v them into a pan/n
a white rabbit/n hops/v across the road/n, then stops/v to eat/v a carrot/n
timelapse/n of clouds/n moving/v over a modern city/n at night/n
a yellow taxi/n turns/v the corner/n and disappears/v
a robot/n dances/v with a little boy/n in the rain/n
a glass/n of water/n falls/v from the table/n and breaks/v
an eagle/n soars/v high above the forest/n
a surfer/n rides/v a huge wave/n in slow motion/n
a couple/n sits/v on a wooden bench/n watching/v the sunset/n
a person/n is playing/v the piano/n
a basketball/n player/n jumps/v and throws/v the ball/n
colorful fish/n swim/v among coral/n in a deep blue ocean/n
a butterfly/n rests/v on a woman's/n hand/n
steam/n rises/v from a cup/n of hot coffee/n on a rainy day/n
a bear/n climbs/v a tree/n to get/v honey/n
a beautiful painting/n of a ship/n sailing/v through a storm/n
""".strip().splitlines()

UNSEEN = """
a brown horse/n gallops/v across an open field/n
a little kitten/n sleeps/v on a soft pillow/n next to a lamp/n
a group/n of people/n cross/v a busy street/n in Tokyo/n
a knight/n in shining/v armor/n fights/v a dragon/n
the leaves/n of an oak/n turn/v orange and fall/v to the ground/n
a child/n builds/v a sandcastle/n while her father/n takes/v pictures/n
a sports/n car/n drives/v along the coast/n at high speed/n
an elephant/n sprays/v water/n with its trunk/n
a waterfall/n in a tropical jungle/n, birds/n flying/v around
a musician/n plays/v the violin/n on a crowded subway/n platform/n
lava/n flows/v down the side/n of a volcano/n at dawn/n
a cyclist/n speeds/v past a row/n of parked cars/n
a teddy/n bear/n washing/v the dishes/n in a small kitchen/n
snow/n falls/v gently on an empty village/n square/n
a ballerina/n spins/v on stage/n under a bright light/n
a pirate/n ship/n sinks/v into the dark sea/n
a squirrel/n holds/v a nut/n and looks/v at the camera/n
a spaceship/n lands/v on a strange planet/n with purple sand/n
a baker/n takes/v fresh bread/n out of the oven/n
an apple/n rolls/v off the table/n and hits/v the floor/n
a lion/n and a tiger/n drink/v from the same river/n
a woman/n wearing/v a red dress/n opens/v the door/n
fireworks/n explode/v over the harbor/n as the crowd/n cheers/v
a monkey/n eats/v a ripe banana/n, then throws/v away the peel/n
a penguin/n slides/v on its belly/n down an icy hill/n
a student/n writes/v in a notebook/n, close-up/n, warm light/n
a lighthouse/n stands/v on a cliff/n above stormy waters/n
two swans/n swim/v toward each other and form/v a heart/n
a farmer/n drives/v an old tractor/n through a wheat/n field/n
smoke/n slowly fills/v an abandoned factory/n while a siren/n sounds/v
""".strip().splitlines()


def parse(line: str) -> tuple[str, list[tuple[str, str]]]:
    """The prompt, and its words with "noun", "verb" or "other"."""
    kinds = {"n": "noun", "v": "verb"}
    tagged = []
    for part in line.replace(",", " ").split():
        word, _, mark = part.partition("/")
        tagged.append((word, kinds.get(mark, "other")))
    return line.replace("/n", "").replace("/v", ""), tagged
