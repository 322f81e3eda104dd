"""General English prose on many subjects, written for this project: to protect, and to see whether it is kept.

The two halves cover like subjects in different words: protect one, measure the other.
"""

PROTECTED = (
    "A glacier is not still. Snow that falls on the upper slopes is pressed into ice by the winters above it, and "
    "the ice creeps downhill a few centimetres a day, carrying stones that were once part of the valley walls. "
    "Where the tongue ends, meltwater runs out grey with fine rock flour, and it colours the lakes below a pale and "
    "milky blue.",
    "The bakery opened at six, but the ovens had been hot since two. Marta shaped the last loaves while her brother "
    "swept flour from the floor. Through the window they could see the first tram pass, empty except for its "
    "driver, who raised one hand from the wheel as he had done every morning for eleven years.",
    "In 1842 the town council voted to drain the marsh. Engineers dug two canals, built a pumping station of red "
    "brick, and sold the new fields to farmers from the north. Within thirty years the population had doubled. The "
    "old ferry was abandoned, and the inn beside it became first a school and later a post office.",
    "Sound travels through air as small changes of pressure. When a string is plucked, it pushes the air around it "
    "back and forth, and these pushes spread outward at about three hundred and forty metres a second. A thicker "
    "string moves more slowly, so it makes fewer waves in the same time, and we hear a lower note.",
    "To repot a plant, water it the day before. Choose a pot only slightly larger than the old one, with a hole in "
    "the bottom, and cover the hole with a piece of broken clay. Loosen the roots gently, set the plant at the same "
    "depth as before, and press fresh soil around it. Keep it out of direct sun for a week.",
    "The defence played deep in the first half and left the visitors little room. After the break the coach sent on "
    "a second striker, and the game opened up. The only goal came from a corner kick in the seventieth minute, "
    "headed in at the near post by the captain, who had missed most of the season with a knee injury.",
    "Octopuses solve problems that would puzzle many other animals. In laboratories they have opened jars, found "
    "their way through mazes, and learned to tell one keeper from another. Most of their nerve cells lie not in the "
    "head but in the arms, each of which can taste, feel and decide a good deal for itself before the brain is "
    "asked.",
    "A bank lends more money than it keeps in its vault. This works because the people who deposit savings rarely "
    "ask for all of them on the same day. When confidence fails, however, a rumour can be enough: customers hurry "
    "to withdraw what they have, and a bank that was sound in the morning may be closed by the evening.",
    "The novel is told by three sisters, each of whom remembers the same summer. The eldest writes as if before a "
    "court, exact about dates and meals. The second leaves out whatever hurts. Only the youngest mentions the fire, "
    "and she does so in a single sentence, as though it had happened to another family in another country.",
    "Doctors once believed that fevers came from bad air. The idea was wrong, but some of the advice that followed "
    "from it was sound: clean streets, covered drains and open windows really did make people healthier. Only when "
    "microscopes improved could anyone see the small living things that pass from one patient to the next.",
    "I walked home along the river because the buses had stopped. It had rained all day, and the water stood almost "
    "level with the path. A heron waited on one leg under the bridge. Nobody else was out, and for the first time "
    "in weeks I did not think about the letter in my pocket or about what I would have to answer.",
    "A computer stores everything as numbers. A letter is a number, a colour is three of them, and a photograph is "
    "several million. The machine itself does not know which is which. Meaning comes from the program that reads "
    "them: the same row of digits may be a song to one program and a street map to another.",
)

HELD_OUT = (
    "Deserts are not always hot. What makes a desert is the lack of rain, and some of the driest places on Earth "
    "lie near the poles, where the air is too cold to hold much water. The sand that we imagine covers only a small "
    "part of them; most are bare rock, gravel or ice, shaped by wind over very long spans of time.",
    "The carpenter measured the door twice and said nothing. Then he took a plane from his bag, laid the door "
    "across two chairs, and began to shave thin curls of wood from its edge. After a quarter of an hour he hung it "
    "again. It closed with a soft click, and my grandmother, who had kicked that door shut for years, laughed out "
    "loud.",
    "The railway reached the coast in the spring of 1871. Before that, fish had been carried inland by cart and was "
    "often spoiled on the way. Now it could be sold in the capital on the morning after the catch. The harbour was "
    "enlarged, a second lighthouse was built on the eastern cliff, and several families grew rich.",
    "Light bends when it passes from air into water, because it moves more slowly there. This is why a spoon in a "
    "glass seems broken, and why a pool looks shallower than it is. A lens uses the same effect: its curved surface "
    "turns rays that were spreading apart so that they meet again at a single point behind it.",
    "For a simple vegetable soup, cut two onions and fry them slowly in oil until they are soft. Add carrots, "
    "potatoes and a stick of celery, all in small pieces, and cover them with water. Let the pot simmer for half an "
    "hour. Season with salt and pepper, and stir in some chopped parsley just before you serve it.",
    "She began the race at the back of the field and passed one runner after another on the long climb. By the last "
    "kilometre only two were left in front of her. The crowd along the road was shouting, but afterwards she said "
    "that she had heard nothing except her own breath and the steps of the woman ahead.",
    "Honeybees tell each other where to find flowers. A worker that has come back to the hive runs along the comb "
    "in a figure of eight, shaking her body on the middle stretch. The angle of that stretch gives the direction "
    "from the sun, and its length gives the distance. The others follow her in the dark and then fly out.",
    "Prices rise when many people want a thing and few are able to offer it. A frost in one country can make coffee "
    "dearer all over the world within a month. Higher prices then tempt farmers elsewhere to plant more, and after "
    "some years the market may be so full that the price falls below where it began.",
    "The painting shows a kitchen with nobody in it. A chair has been pushed back from the table, a cup stands half "
    "full, and the door to the garden is open. The light is that of late afternoon. Critics have argued for decades "
    "about who has just left the room, and the artist, when she was asked, would only smile.",
    "The heart is a pump with four chambers. Two of them receive blood, from the body and from the lungs, and two "
    "send it out again. Valves between them open in one direction only, and their closing makes the sound that a "
    "doctor listens for. In a life of eighty years it beats about three thousand million times without a holiday.",
    "We reached the village after dark and could not find the house. A dog barked behind a gate, and then an old "
    "man came out with a lamp and asked us whom we wanted. When he heard the name he shook his head. They had moved "
    "away in the autumn, he said, but we were welcome to sleep in his barn until the morning.",
    "A map is always a kind of lie. The surface of a globe cannot be laid flat without stretching it somewhere, so "
    "every map must choose what to keep: the shapes of the coasts, the true size of the countries, or the straight "
    "line between two ports. Sailors and tax collectors have never wanted the same one.",
)
