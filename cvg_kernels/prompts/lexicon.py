"""English words by kind, as far as prompts of videos need them told apart."""

from __future__ import annotations

# ruff: noqa: SIM905  (a list of a hundred words is read more easily without quotation marks)

#: Articles and other words that come before a noun.
DETERMINERS = frozenset(
    "a an the this that these those my your his her its our their some any no each every either neither "
    "another both all several many few much more most other same such what which whose".split()
)
PREPOSITIONS = frozenset(
    "about above across after against along alongside amid among amongst around as at atop before behind below "
    "beneath beside besides between beyond by down during except for from in inside into like near of off on onto "
    "out outside over past per through throughout till to toward towards under underneath until up upon via with "
    "within without".split()
)
PRONOUNS = frozenset(
    "i me you he him she it we us they them mine yours hers ours theirs myself yourself himself herself itself "
    "ourselves themselves one someone somebody something anyone anybody anything everyone everybody everything "
    "nobody nothing who whom there".split()
)
AUXILIARIES = frozenset(
    "am is are was were be been being do does did doing done has have had having will would can could shall should "
    "may might must let lets isn't aren't wasn't weren't ain't don't doesn't didn't hasn't haven't hadn't won't "
    "wouldn't can't cannot couldn't shan't shouldn't mustn't".split()
)
CONJUNCTIONS = frozenset(
    "and or but nor so yet if because since than though although unless whereas while when whenever where wherever "
    "whether how why then not".split()
)
ADVERBS = frozenset(
    "again ago ahead almost alone already also always apart aside away back backward backwards downward downwards "
    "else even ever everywhere far fast forward forwards here just maybe meanwhile next never now often once only "
    "perhaps quite rather sideways sometimes somewhere soon still together today too twice upside upward upwards "
    "upstream very well indoors outdoors overhead nearby straight instead".split()
)
NUMBERS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve twenty thirty fifty hundred thousand first "
    "second third half dozen".split()
)
FUNCTION_WORDS = DETERMINERS | PREPOSITIONS | PRONOUNS | AUXILIARIES | CONJUNCTIONS | ADVERBS | NUMBERS

#: Where things move; the default choice of words leaves them out.
MOTION = frozenset(
    "move moves moved moving motion left right leftward leftwards rightward rightwards up down upward downward "
    "forward backward".split()
)

#: How good the picture shall be; they show nothing.
QUALITY = frozenset(
    "hd fhd uhd hdr sdr 2k 4k 8k 16k 480p 720p 1080p 1440p 2160p 24fps 30fps 60fps fps best quality masterpiece "
    "detailed detail details ultra ultra-detailed ultra-hd ultra-realistic hyper-realistic hyperrealistic realistic "
    "photorealistic photo-realistic high-quality high-resolution high-res highres hi-res resolution absurdres "
    "award-winning professional stunning cinematic sharp-focus trending artstation".split()
)

ADJECTIVES = frozenset(
    "red orange yellow green blue purple violet pink brown black white grey gray silver golden beige turquoise cyan "
    "magenta crimson scarlet maroon teal navy dark bright light pale vivid colorful colourful colored blonde blond "
    "big small large little tiny huge giant gigantic massive tall short long wide narrow thick thin deep high low "
    "flat round square-shaped sharp soft hard heavy old young new ancient modern vintage retro antique futuristic "
    "medieval hot cold warm cool icy fresh dry wet rainy snowy sunny cloudy foggy misty stormy windy sandy rocky "
    "muddy dusty grassy smoky steamy shiny glossy rusty dirty clean fluffy furry hairy fuzzy curly shaggy sleepy "
    "happy sad angry hungry funny scary spooky creepy cute pretty ugly beautiful handsome lovely lonely friendly "
    "lively elderly extreme calm quiet loud silent busy empty full open closed crowded narrow strange weird wild tame "
    "free rich poor strong weak fast slow quick gentle brave smart clever crazy lazy noisy juicy tasty spicy crispy "
    "creamy ripe raw sweet sour bitter salty fancy elegant simple plain real fake magic magical mystical mythical "
    "natural tropical urban rural coastal royal digital medical central vertical horizontal aerial animal-like "
    "cosmic celestial eternal final floral industrial local lunar macro solar national normal original personal "
    "physical special spiritual surreal total traditional tribal typical unusual usual visual wooden metallic "
    "stone-built silken woolen electric electronic dramatic epic gothic exotic domestic majestic romantic rustic "
    "realistic fantastic cinematic panoramic scenic dynamic static toxic tragic photorealistic asian african "
    "american european chinese japanese french italian english german indian russian korean british spanish "
    "good bad great nice perfect best better worst favorite different similar single double entire whole main "
    "upper lower inner outer front rear middle distant close near far top common rare popular famous lush dense "
    "clear blurry hazy gloomy moody cozy cosy tidy messy bare naked blind deaf dead alive asleep awake afraid "
    "proud shy smooth rough tight loose solid liquid transparent opaque fluorescent luminous radiant serene tranquil "
    "peaceful vast immense mighty tough fierce graceful adorable male female human-like adult senior junior chubby "
    "slim skinny fat lean muscular bald bearded pregnant homeless abandoned overgrown frozen broken worn torn hidden "
    "sunken fallen stolen unknown ready able due able ornate intricate delicate remote secret steep crooked round "
    "square-jawed oversized miniature mini mechanical robotic neon pastel monochrome various multiple".split()
)

#: What can be a noun as well, so it is one where no noun follows.
ADJECTIVES_OR_NOUNS = frozenset(
    "orange light dark cold human adult male female silver gold magic neon front top middle right left square wild "
    "liquid solid classic giant miniature senior junior".split()
)

#: Nouns that end like verbs, adverbs or adjectives.
NOUNS = frozenset(
    "building painting drawing ceiling morning evening wedding ring king string spring wing swing clothing lightning "
    "thing lighting railing icing clearing crossing parking ping sling earring duckling sibling pudding dumpling "
    "stocking offspring starling sterling being viking shilling sing-along setting meeting meaning landing-strip "
    "bed sled shed seed weed reed feed speed bleed breed steed creed hundred "
    "fly butterfly dragonfly firefly family belly jelly lily bully ally assembly rally monopoly july italy reply "
    "supply holly trolley fish jellyfish goldfish starfish dish brush bush radish table vegetable cable stable "
    "music mechanic traffic picnic fabric comic ceramic garlic plastic attic arctic clinic critic graphic mosaic "
    "animal crystal festival medal petal metal pedal canal signal capital hospital cathedral meal seal "
    "olive dive hive drive detective archive native glove "
    "dress glass grass class cross boss moss princess mattress compass actress waitress chess address fortress "
    "bus lens canvas christmas octopus cactus circus campus virus gas atlas tennis bias news sports".split()
)

#: Verbs in the form that the dictionary has.
VERBS = frozenset(
    "accelerate add admire appear applaud approach arrange arrive ascend ask assemble attack awaken bake balance bark "
    "bathe beat become beg begin bend bite blast bleed blend blink blossom blow blush board boil bounce bow brew "
    "bring browse build burn burst buy calculate call capture carry carve cast catch celebrate change charge chase "
    "chat check cheer chew chop circle clap clean climb cling close collapse collect collide come compete cook cough "
    "count cover crack crash crawl create creep cross cry cuddle cut dance dash decorate descend dig dine disappear "
    "discover dissolve dive drag draw dress drift drink drip drive drop drown eat embrace emerge enjoy enter erupt "
    "escape evolve examine exit expand explode explore express extend face fade fall feed feel fight fill film find "
    "fish fix flap flash flee flicker float flow flutter fly fold follow form freeze gallop gather gaze get give "
    "glide glitter glow go grab graze greet grin grip grow guide hang hatch hit hold hop hover howl hug hunt hurry "
    "ice-skate illuminate inspect jog join juggle jump keep kick kiss kneel knit knock laugh launch lay land lead "
    "leap learn leave lick lie lift light listen load look lose make march mark marvel meditate meet melt merge mix "
    "morph mow navigate nod observe open orbit overlook pack paddle paint pan park pass paw peck peel peer perch "
    "perform pet pick play plunge point pose pour pray prepare press pull purr push put race rain raise reach read "
    "reflect relax remove repair rest reveal ride ring rinse rise roam roar roast roll rotate row run rush sail "
    "salute say scatter scoop scratch scream scroll sculpt search see sell send serve set sew shake shatter shave "
    "shed shift shine shoot shop shout show shuffle sign sing sink sip sit skate skateboard sketch ski skip slam "
    "sleep slice slide slip smash smell smile smoke snap sneak sneeze sniff snore snow soak soar solve sound sparkle "
    "speak speed spend spill spin spit splash split spray spread sprint squeeze squint stack stagger stand stare "
    "start stay steal step stick stir stop stretch stride stroke stroll struggle study surf surface surround swallow "
    "sway sweep swim swing swirl switch take talk tap taste teach tear tell think throw tie tilt toast toss touch "
    "tour tower track train transform travel tremble trim trot try tumble turn twirl twist type unfold unwrap use "
    "vanish visit wade wag wait wake walk wander wash watch water wave wear weave weep weigh whip whisk whisper "
    "whistle win wink wipe work wrap wrestle write yawn yell zoom".split()
)

#: Verbs that are nouns first of all: "city lights", "ocean waves".
VERBS_OR_NOUNS = frozenset(
    "board cast circle clap crack dress drop face film fish flash form guide ice light mark orbit paint pan park paw "
    "peel pet point rain ring row sail shed shop shot show sign ski smoke snow sound stack step stick surface surf "
    "track tower toast tour train trim type water wave whip work".split()
)

#: Forms that no rule makes.
IRREGULAR_FORMS = frozenset(
    "ate became began bent bit blew bought broke brought built burnt came caught chose clung crept dealt drank drew "
    "drove dug fed fell felt flew fought found froze gave got grew held hid hung kept knelt knew laid leapt led left "
    "lit lost made met paid ran rang rode rose said sang sank sat saw sent shone shook shot sold spent spoke spun "
    "stood stole struck stuck swam swept swung taught thought threw told took torn tore went woke won wore wove wrote "
    "breaks break lies dies die ties".split()
)
