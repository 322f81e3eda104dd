"""Four small language tasks whose labels follow from what a word means: made here, so that they work offline.

Each task maps a word to a label by what the word *means*, through a mapping nobody can guess (animals go to "North"):
an untuned model is at chance, and since no test word is ever trained on, only language knowledge scores.

    >>> task = make_task("warehouse")
    >>> task["train"][0].keys(), len(task["test"]), task["labels"]
    (dict_keys(['prompt', 'answer']), 100, ['North', 'South', 'East', 'West'])
"""

from __future__ import annotations

import random
from typing import Any


# task: (phrasings, {label: words}). Words are separated by commas; no word is in two lists of one task.
_TASKS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "warehouse": (
        (
            "A toy {} arrives at the warehouse. Which hall does it go to? Answer:",
            "Toy warehouse, new item: {}. Hall? Answer:",
            "A customer wants a toy {}. In which hall of the warehouse do we look? Answer:",
            "Please tell me the hall where we store every toy {}. Answer:",
        ),
        {
            "North": (
                "horse,cow,goat,sheep,pig,donkey,rabbit,hamster,tiger,lion,leopard,elephant,giraffe,zebra,"
                "monkey,gorilla,wolf,fox,bear,deer,moose,camel,kangaroo,koala,panda,otter,beaver,squirrel,"
                "hedgehog,badger,raccoon,whale,dolphin,walrus,penguin,eagle,owl,parrot,pigeon,goose,duck,"
                "rooster,swan,flamingo,ostrich,crow,snake,lizard,crocodile,turtle,frog,toad,shark,octopus,"
                "butterfly,spider,cat,dog,hippo,rhino"
            ),
            "South": (
                "hammer,screwdriver,wrench,saw,drill,chisel,axe,hatchet,shovel,rake,hoe,pickaxe,crowbar,"
                "clamp,vise,anvil,ladder,toolbox,tape measure,spirit level,paintbrush,trowel,mallet,"
                "soldering iron,wire cutter,chainsaw,lathe,sander,grinder,welding torch,utility knife,stapler,"
                "glue gun,nail gun,hacksaw,pitchfork,sickle,scythe,socket set,hex key,plunger,workbench,"
                "multimeter,caliper,spade,machete,pocket knife,flashlight,blowtorch,bolt,nail,screw,"
                "hand plane,pair of pliers,set of pruning shears,paint roller,scraper,broom"
            ),
            "East": (
                "loaf of bread,cheese,butter,yogurt,apple,banana,orange,grape,strawberry,peach,pear,mango,"
                "pineapple,lemon,potato,carrot,onion,garlic,tomato,cucumber,lettuce,spinach,broccoli,cabbage,"
                "bowl of rice,pasta,noodle,soup,pizza,hamburger,sandwich,sausage,bacon,omelette,pancake,"
                "waffle,cookie,cake,muffin,doughnut,chocolate,honey,jam,popcorn,peanut,almond,salad,cereal,"
                "tofu,mushroom,croissant,pretzel,burrito,dumpling,pickle,olive,cherry,melon,coconut,candy"
            ),
            "West": (
                "car,truck,bus,van,taxi,motorcycle,bicycle,scooter,tractor,bulldozer,ambulance,fire engine,"
                "limousine,tram,train,locomotive,helicopter,airplane,glider,jet,hot air balloon,rocket,"
                "spaceship,boat,ship,ferry,canoe,kayak,yacht,sailing dinghy,submarine,raft,jeep,minivan,"
                "sedan,convertible,go-kart,snowmobile,sled,hovercraft,rickshaw,carriage,wagon,trailer,moped,"
                "forklift,steamroller,seaplane,airship,gondola,trolley,barge,tanker,racing car,pickup,"
                "cruise liner,zeppelin,lorry"
            ),
        },
    ),
    "helpdesk": (
        (
            'A colleague writes: "I have a question about {}." Who answers? Answer:',
            'Message: "Can someone help me with {}?" Forward it to whom? Answer:',
            "Subject: {}. Which colleague takes this message? Answer:",
            'Voicemail: "Please call me back, it is about {}." Who calls back? Answer:',
        ),
        {
            "Anna": (
                "my keyboard,the printer,a slow laptop,the wifi,a software update,my monitor,a computer virus,"
                "the server,a broken mouse cable,my email inbox,the database,a backup disk,the web browser,"
                "a USB stick,my login screen,the router,a headset,the webcam,a crashed program,"
                "the spreadsheet app,a touchscreen,the network cable,my hard drive,an error code,a frozen tablet,"
                "the video call software,a docking station,a phishing link,the firewall,a missing driver,"
                "the scanner,my phone charger,the operating system,a Bluetooth speaker,a download,"
                "the search engine,the cloud storage,a memory card,the projector,a full mailbox,the website,"
                "a new app,a graphics card,the VPN"
            ),
            "Boris": (
                "an invoice,my salary,a tax form,the budget,a refund,an expense claim,a bank transfer,"
                "the yearly bonus,a late payment,the exchange rate,my pension fund,a credit card bill,"
                "the price list,a loan,the interest rate,a receipt,petty cash,an unpaid debt,a discount,"
                "the balance sheet,the profit forecast,a cheque,the payroll,the deposit,a mortgage,the audit,"
                "a savings account,travel costs,the quarterly earnings,a wage increase,the currency,a donation,"
                "stock options,the annual dividend,the cost of rent,a purchase order,VAT,the accountant,"
                "a down payment,a fee,the investment plan,overtime pay,a sales commission,the cash register"
            ),
            "Clara": (
                "a headache,my sore throat,a high fever,a broken arm,the flu,back pain,an allergy,a cough,"
                "a vaccine,blood pressure,a twisted ankle,a bee sting,a nosebleed,my asthma,a toothache,"
                "an eye infection,dizziness,a rash,a burned finger,food poisoning,a bandage,the first aid kit,"
                "a painkiller,insomnia,a migraine,stomach cramps,a concussion,my diabetes,a runny nose,"
                "a swollen knee,sunburn,an upset stomach,chest pain,a sprained wrist,a deep cut,a bruise,nausea,"
                "antibiotics,a heart murmur,a stiff neck,dehydration,an earache,a blister,a doctor's appointment"
            ),
            "David": (
                "a contract,a lawsuit,the court hearing,a patent,a copyright notice,the privacy law,"
                "a lawyer's letter,a trademark,a witness statement,the licence terms,a subpoena,a settlement,"
                "a judge's ruling,legal liability,a non-disclosure agreement,the terms of service,"
                "an eviction notice,a notary,a breach of agreement,the arbitration,a power of attorney,"
                "a defamation claim,the regulation,a criminal charge,the appeal,a legal dispute,an injunction,"
                "the plaintiff,the jury,a will and testament,a custody case,the statute,compliance rules,a clause,"
                "the verdict,a cease and desist letter,employment law,a search warrant,a prosecutor,"
                "the constitution,an affidavit,the trial date,bail,an attorney"
            ),
        },
    ),
    "mood": (
        (
            "In the story the boy feels {}. Which card shows this emotion? Answer:",
            "She said that she was {} all day. Which card shows this emotion? Answer:",
            "Everyone in the room looked {}. Which card shows this emotion? Answer:",
            "The mood of the scene is {}. Which card shows this emotion? Answer:",
        ),
        {
            "Circle": (
                "happy,cheerful,delighted,joyful,thrilled,pleased,glad,ecstatic,elated,jubilant,merry,"
                "overjoyed,content,blissful,excited,amused,satisfied,grateful,optimistic,radiant,euphoric,"
                "jolly,upbeat,proud,festive,playful,lighthearted,enthusiastic,exhilarated,triumphant,carefree,"
                "gleeful,enchanted,hopeful,charmed,lucky,inspired,giggly,full of laughter,beaming with joy,"
                "in high spirits,smiling,on top of the world,in love,blessed,peaceful"
            ),
            "Square": (
                "angry,furious,annoyed,irritated,outraged,enraged,livid,mad,irate,resentful,bitter,hostile,"
                "aggravated,exasperated,infuriated,indignant,fuming,seething,incensed,offended,provoked,"
                "vengeful,hateful,grumpy,cranky,bad-tempered,displeased,fed up,frustrated,hot-headed,wrathful,"
                "spiteful,quarrelsome,belligerent,aggressive,full of rage,ready to shout,scowling,insulted,"
                "snarling,ticked off,hot with temper,out for revenge,disgusted,boiling mad,impatient"
            ),
            "Moon": (
                "sad,unhappy,sorrowful,depressed,gloomy,miserable,heartbroken,mournful,dejected,melancholy,"
                "tearful,weepy,full of grief,lonely,downcast,despondent,hopeless,crushed,devastated,glum,"
                "disheartened,forlorn,wretched,dismal,disappointed,regretful,homesick,close to tears,crying,"
                "bereaved,heavy-hearted,discouraged,low,dispirited,crestfallen,down,woeful,abandoned,"
                "inconsolable,in despair,wistful,somber,in mourning,sobbing,broken,empty"
            ),
        },
    ),
    "museum": (
        (
            "The museum shows a picture of {}. On which floor? Answer:",
            "Which floor has the photo of {}? Answer:",
            "A guide explains {}. Which floor are we on? Answer:",
            "Ticket for {}. Floor? Answer:",
        ),
        {
            "Gold": (
                "a shirt,a jacket,trousers,a skirt,a dress,a hat,gloves,a scarf,socks,shoes,boots,sandals,"
                "a sweater,a coat,jeans,shorts,a belt,a tie,pyjamas,a bikini,a swimsuit,a vest,a suit,"
                "a blouse,a raincoat,slippers,sneakers,a cap,mittens,underwear,a bathrobe,tights,a hoodie,"
                "a cardigan,a uniform,a kimono,a helmet,an apron,a wedding gown,leggings,a T-shirt,a turban,"
                "a bow tie,high heels"
            ),
            "Silver": (
                "a guitar,a piano,a violin,drums,a trumpet,a flute,a clarinet,a saxophone,a cello,a harp,"
                "an organ,a trombone,a tuba,a banjo,a mandolin,a harmonica,an accordion,a xylophone,"
                "a tambourine,bagpipes,a ukulele,an oboe,a bassoon,a keyboard,maracas,cymbals,a triangle,"
                "a gong,a recorder,a lute,a sitar,a double bass,a viola,a French horn,a bugle,castanets,"
                "a synthesizer,bongos,a fiddle,a harpsichord,a music box,a bass guitar,a piccolo,a zither"
            ),
            "Iron": (
                "a rose,a tulip,a daisy,a sunflower,an oak tree,a pine tree,a maple,a willow,a birch,"
                "a cactus,a fern,moss,grass,ivy,a palm tree,bamboo,a lily,an orchid,a daffodil,lavender,"
                "a violet,a poppy,a carnation,clover,a dandelion,a thistle,a bush,a hedge,seaweed,a vine,"
                "a chestnut tree,a cedar,a cypress,a redwood,an elm,a poplar,jasmine,a lotus,an iris,"
                "a magnolia,a marigold,wheat,a shrub,holly"
            ),
            "Bronze": (
                "a hand,a foot,a knee,an elbow,a shoulder,a neck,a nose,an ear,an eye,a mouth,a tongue,"
                "teeth,lips,hair,a finger,a thumb,a toe,an ankle,a wrist,an arm,a leg,a hip,a chest,"
                "a stomach,a back,the brain,the heart,a lung,the liver,a kidney,bones,a skull,the spine,"
                "a rib,muscles,skin,blood,veins,a chin,a cheek,the forehead,an eyebrow,the throat,the jaw"
            ),
        },
    ),
}
TASKS = tuple(_TASKS)


def make_task(name: str, n_train: int = 400, n_test: int = 100, seed: int = 0) -> dict[str, Any]:
    """One embedded task as dict(name, train, test, labels), balanced over labels; a quarter of the words is test only.

    The same (name, seed) gives the same words in train and test whatever n_train and n_test are.
    """
    if name not in _TASKS:
        raise ValueError(f"no embedded task {name!r}: choose one of {', '.join(TASKS)}, or pass --data DIR")
    phrasings, lists = _TASKS[name]
    rng = random.Random(f"{name}/{seed}")
    pools: dict[str, list[list[dict[str, str]]]] = {"train": [], "test": []}
    words_of: dict[str, set[str]] = {"train": set(), "test": set()}
    for label, text in lists.items():
        words = text.split(",")
        rng.shuffle(words)
        cut = len(words) // 4
        for split, part in (("test", words[:cut]), ("train", words[cut:])):
            words_of[split].update(part)
            records = [{"prompt": p.format(w), "answer": label} for w in part for p in phrasings]
            pools[split].append(rng.sample(records, len(records)))
    assert not words_of["train"] & words_of["test"], words_of["train"] & words_of["test"]
    task: dict[str, Any] = {"name": name, "labels": list(lists)}
    for split, n in (("train", n_train), ("test", n_test)):
        most = min(map(len, pools[split])) * len(lists)
        if not 0 < n <= most:
            raise ValueError(f"n_{split}={n}: {name} has {most} different {split} prompts, ask for 1 to {most}")
        records = [record for group in zip(*pools[split], strict=False) for record in group][:n]  # balanced
        task[split] = random.Random(f"{name}/{seed}/{split}").sample(records, n)
    return task
