"""Everyday prompts and passages, used if the user names none. They were written for this purpose, so that no model has trained
on them, and none belongs to a user's own task."""

PROMPTS = (
    "What is the capital of Portugal?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about rain on a tin roof.",
    "How do I boil an egg so that the yolk stays soft?",
    "What is 17 + 26? Answer with the number alone.",
    "Translate into French: Where is the nearest railway station?",
    (
        "Summarise in one sentence: The council met on Tuesday and agreed, after a long debate, to repair the old bridge "
        "next spring."
    ),
    "List three things to take along on a hike in the mountains.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite e-mail that asks a colleague to move a meeting to Thursday.",
    "Is the following review positive or negative? 'The plot was thin, but I laughed from beginning to end.'",
    "Write a Python function that returns the largest number in a list.",
    "Who wrote Romeo and Juliet?",
    "Give me a title for a story about a lighthouse keeper who is afraid of the dark.",
    "Why do leaves change colour in autumn?",
    "How many minutes are there in three and a half hours?",
    "Suggest a name for a small bakery by the sea.",
    "What does the proverb 'Look before you leap' mean?",
    "Name the planets of the solar system.",
    "Rewrite this sentence in the past tense: She walks to work and buys a newspaper.",
    "My bicycle chain keeps falling off. What can I check?",
    "Describe a market square early in the morning in three sentences.",
    "What should I consider before I adopt a dog?",
    "Explain what a loop is to somebody who has never programmed.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Give an example of a renewable source of energy and one of its drawbacks.",
    "Correct the mistakes: 'He don't know where is his keys.'",
    "What are the three states of matter that everybody meets every day?",
    "Erkläre in zwei Sätzen, wie ein Regenbogen entsteht.",
    "Explique en deux phrases pourquoi il faut se laver les mains avant de manger.",
    "¿Cuáles son las estaciones del año y qué tiempo suele hacer en cada una de ellas?",
    "Descrivi in poche frasi una passeggiata sulla spiaggia in una giornata d'inverno.",
)

TEXTS = (
    "The harbour lay quiet before sunrise. Two boats had come in during the night, and their crews were still asleep below "
    "deck while the gulls argued over a torn net on the quay. An old man with a lantern walked along the wall and counted "
    "the ropes, as he had done every morning since the storm took his brother's boat. When he reached the end he turned "
    "round, looked at the sky for a moment, and decided that the wind would come from the west.",
    "A bicycle stays upright mainly because it steers into the direction in which it falls. When the frame leans to the "
    "left, the front wheel turns to the left as well, and the wheels move back under the weight of the rider. The faster "
    "the bicycle goes, the smaller the correction that is needed. At walking pace the corrections become large, which is "
    "why beginners find it easier to ride quickly than to ride slowly.",
    "To make a simple vegetable soup, chop two onions, three carrots and a stick of celery. Fry them gently in a spoonful "
    "of oil until the onions are soft, then add two diced potatoes and a litre of stock. Let everything simmer for twenty "
    "minutes. Season with salt, pepper and a little lemon juice, and serve it with bread. If you like it smooth, blend the "
    "soup before you season it.",
    "The town had one library, and the library had one rule that nobody had ever written down: books came back when they "
    "were ready. Some returned after a week, some after a generation. Mrs Okafor, who kept the register, once received a "
    "novel with a note tucked inside it. 'My grandmother borrowed this,' it said. 'She asked me to tell you that she "
    "finally liked the ending.'",
    "Water expands when it freezes. A bottle that is filled to the brim and left in a freezer will often crack, because ice"
    " takes up about nine per cent more space than the liquid it was made from. The same thing happens in the small cracks "
    "of rocks. Rain runs in during the day, the night frost widens the gap, and over many winters whole cliffs are broken "
    "into stones.",
    "The committee considered three proposals for the empty site beside the station. The first was a car park, which would "
    "pay for itself within six years. The second was a row of workshops at low rents. The third, put forward by pupils of "
    "the school across the road, was a garden with a pond. After some discussion the members asked for the costs of the "
    "second and the third to be worked out in more detail, and adjourned until April.",
    "Nadia had never learned to swim, and at forty-one she was tired of explaining why. She bought a blue costume, a pair "
    "of goggles and a ticket for ten lessons. In the first lesson she held on to the edge and breathed. In the second she "
    "let go with one hand. By the sixth she could cross the shallow end with her face in the water, and on the way home she"
    " laughed so much that the bus driver asked what had happened.",
    "An index in a database works much like the index of a book. Without it, a program that looks for one name has to read "
    "every row of the table from the first to the last. With it, the program looks the name up in a sorted structure and "
    "jumps straight to the right place. The price is paid when rows are added or changed, because the index has to be kept "
    "up to date as well, and it takes up space of its own.",
    "'You are late,' said the clockmaker without looking up. 'By your clocks or by mine?' asked the visitor, and put a "
    "small parcel on the bench. The clockmaker unwrapped it slowly. Inside lay a watch with no hands. 'It still runs,' said"
    " the visitor. 'It has only stopped telling anybody.' For the first time that day the old man smiled, and he reached "
    "for his finest screwdriver.",
    "Interest that is paid on interest grows faster than most people expect. A sum of one thousand that earns five per cent"
    " a year becomes one thousand and fifty after the first year. In the second year the five per cent is counted on the "
    "larger amount, and so on. After about fourteen years the sum has doubled, although fourteen times five is only "
    "seventy.",
    "Bees tell each other where they have found flowers by dancing. A worker that returns to the hive walks in a straight "
    "line while she shakes her body, then circles back and repeats the walk. The angle of the line shows the direction "
    "relative to the sun, and the length of the walk shows the distance. Her sisters follow her in the dark and feel the "
    "movement with their antennae.",
    "The new timetable comes into force on the second Monday of September. Buses on route 12 will run every ten minutes "
    "until seven in the evening and every half hour after that. The stop at Mill Lane is moved to the other side of the "
    "road while the pipes are being replaced. Tickets that were bought before the change remain valid until the end of the "
    "year.",
    "Before the invention of printing, a book was copied by hand, and a careful scribe might finish a few pages in a day. "
    "Errors crept in: a line was skipped, a word was misread, a note in the margin slipped into the text. Scholars who "
    "compare copies can often tell from shared mistakes which manuscript was the parent of which, much as biologists draw "
    "the family tree of living things.",
    "It rained for the whole of the school trip. The lake could not be seen, the castle was closed for repairs, and the "
    "sandwiches had been left on the bus. Yet when the children were asked to write about their day, not one of them "
    "mentioned any of this. They wrote about the frog that had jumped into the teacher's hood, and about how nobody had "
    "told him until they were back at the gate.",
    "A lever makes it possible to lift a heavy load with a small force, but nothing is won for free. If the long arm is "
    "four times the length of the short one, the hand has to push with only a quarter of the weight, and it has to travel "
    "four times as far. The work that is done remains the same. Cranes, scissors and the bones of the forearm all follow "
    "this rule.",
    "Dear neighbours, from Friday evening there will be some noise in the courtyard, as my daughter is getting married and "
    "the musicians do not know how to play quietly. We will stop at midnight. There is plenty of food, far more than our "
    "guests can eat, so please come down and help us with it. If you work early on Saturday, tell me, and I will bring you "
    "cake as an apology.",
)
