"""Search space syntax: parsing, errors with a caret, and equality with what Ray Tune samples."""

import math
import subprocess
import sys

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from raybge.cli.options import MineOptions, TrainOptions
from raybge.cli.parser import build_options, declared_flags
from raybge.tuning.search_space import FUNCTIONS, Domain
from raybge.tuning.search_space_parser import NOT_SEARCHED, parse_search_space
from raybge.util.errors import UserError

FLAGS = declared_flags(TrainOptions)
PROMPT = "query_instruction_for_retrieval"


@pytest.mark.parametrize(
    ("word", "name", "domain"),
    [
        ("learning_rate=loguniform(1e-6,1e-4)", "learning_rate", Domain("loguniform", (1e-6, 1e-4))),
        (" temperature = uniform( 0.01 , .1 ) ", "temperature", Domain("uniform", (0.01, 0.1))),
        ("weight_decay=quniform(0,0.1,0.05)", "weight_decay", Domain("quniform", (0.0, 0.1, 0.05))),
        ("train_group_size=randint(2,9)", "train_group_size", Domain("randint", (2, 9))),
        ("lora_rank=lograndint(1,256)", "lora_rank", Domain("lograndint", (1, 256))),
        ("lora_alpha=randint(8,64)", "lora_alpha", Domain("randint", (8, 64))),
        ("seed=grid(1,2,3)", "seed", Domain("grid", (1, 2, 3))),
        ("lr_scheduler_type=choice(linear, cosine)", "lr_scheduler_type", Domain("choice", ("linear", "cosine"))),
        ("normalize_embeddings=choice(True,no)", "normalize_embeddings", Domain("choice", (True, False))),
        (f'{PROMPT}=choice("", "a, (b) ",c d,"\\"")', PROMPT, Domain("choice", ("", "a, (b) ", "c d", '"'))),
    ],
)
def test_texts_become_domains(word, name, domain):
    assert parse_search_space([word], FLAGS) == {name: domain}


def test_several_flags_in_one_text_or_in_several():
    one = parse_search_space(["seed=choice(1) temperature=uniform(0.01,1)", "", "use_lora=grid(True,False)"], FLAGS)
    many = parse_search_space(["seed=choice(1)", "temperature=uniform(0.01,1)", "use_lora=grid(True,False)"], FLAGS)
    assert one == many and list(one) == ["seed", "temperature", "use_lora"]


def test_mining_flags():
    space = parse_search_space(["range_for_sampling=choice(2-100,10-210)"], declared_flags(MineOptions))
    assert space == {"range_for_sampling": Domain("choice", ("2-100", "10-210"))}


# Message, text, and the position of the caret below the text.
MISTAKES = """
there is no flag learning_rat; did you mean learning_rate?
    learning_rat=uniform(1,2)
    ^
there is no flag xyz
    seed=choice(1) xyz=uniform(1,2)
                   ^
there is no domain unifrom; did you mean uniform?
    learning_rate=unifrom(1,2)
                  ^
there is no domain 3e-5; for one fixed value, use --learning_rate itself
    learning_rate=3e-5
                  ^
expected = and a domain after learning_rate
    learning_rate
                 ^
expected = and a domain after learning_rate
    learning_rate(1,2)
                 ^
expected a flag name
    =uniform(1,2)
    ^
expected a domain such as uniform(lo,hi)
    learning_rate=
                  ^
expected a domain such as randint(lo,hi)
    seed=(1,2)
         ^
expected ( after uniform
    learning_rate=uniform
                         ^
this parenthesis is never closed
    learning_rate=uniform(1,2
                         ^
the domain of learning_rate ends here
    learning_rate=uniform(1,2))
                              ^
the domain of learning_rate ends here; separate flags with a space
    learning_rate=uniform(1,2),seed=randint(1,2)
                              ^
expected a comma or ) here, found (
    learning_rate=uniform(1,2 seed=randint(1,2)
                                          ^
the interval is empty: 2 is not below 2
    learning_rate=uniform(2,2)
                          ^
the interval is empty: 9 is not below 8
    seed=randint( 9,8)
                  ^
loguniform takes numbers above 0: 0 has no logarithm
    learning_rate=loguniform(0,2)
                             ^
lograndint takes numbers above 0: -1 has no logarithm
    seed=lograndint(-1,2)
                    ^
uniform(lo,hi) takes 2 numbers, found 0
    learning_rate=uniform()
                          ^
uniform(lo,hi) takes 2 numbers, found 1
    learning_rate=uniform(1)
                           ^
quniform(lo,hi,q) takes 3 numbers, found 4
    learning_rate=quniform(1,2,1,5)
                                 ^
expected a number, found nothing
    learning_rate=uniform(1,)
                            ^
expected a number, found b
    learning_rate=uniform(1, b)
                             ^
expected a whole number, found 2.5
    seed=randint(1,2.5)
                   ^
expected a whole number, found x
    seed=choice(1,x)
                  ^
nan is not a number in the accepted range
    learning_rate=uniform(nan,1)
                          ^
1e999 is not a number in the accepted range
    learning_rate=choice(1,1e999)
                           ^
99999999999999999999 is not a number in the accepted range
    seed=randint(1,99999999999999999999)
                   ^
uniform samples real numbers, but seed takes a whole number: use randint(lo,hi)
    seed=uniform(1,2)
         ^
randint samples whole numbers, but use_lora takes True or False: use choice(True,False)
    use_lora=randint(0,1)
             ^
q must be above 0, found 0
    learning_rate=quniform(1,2,0)
                               ^
2 is not a multiple of q, which is .6
    learning_rate=quniform(1.2,2,.6)
                               ^
grid requires at least one value
    seed=grid()
              ^
expected a value; the empty text is written ""
    seed=choice(1,,2)
                  ^
1.0 is a duplicate value
    learning_rate=choice(1,2,1.0)
                             ^
normalize_embeddings takes True or False, found yep
    normalize_embeddings=choice(True,yep)
                                     ^
partition_mode takes one of joint, per_direction, found join; did you mean joint?
    partition_mode=choice(join)
                          ^
this quote is never closed
    query_instruction_format=choice(a, "b)
                                       ^
in quotes, write \\" for a quote
    query_instruction_format=choice("a\\q")
                                      ^
output_dir cannot be searched: it is a path, not a setting
    seed=choice(1)   output_dir=choice(a)
                     ^
num_workers cannot be searched: training results do not depend on the machine
    num_workers=choice(1,2)
    ^
eval_steps cannot be searched: trials are compared by their evaluation
    eval_steps=choice(1,2)
    ^
mrl_dims cannot be searched: it takes a list
    mrl_dims=choice(1)
    ^
lr_scheduler_kwargs cannot be searched: it takes a JSON object
    lr_scheduler_kwargs=choice(1)
    ^
push_to_hub cannot be searched: workers have no hub login
    push_to_hub=choice(True)
    ^
normalize_embeddings is searched twice
    normalize_embeddings=choice(True) normalize_embeddings=choice(False)
                                      ^
""".strip().splitlines()


@pytest.mark.parametrize(
    ("message", "text", "caret"), [(a, b[4:], c[4:]) for a, b, c in zip(*[iter(MISTAKES)] * 3, strict=True)]
)
def test_mistakes_are_marked_with_a_caret(message, text, caret):
    with pytest.raises(UserError) as error:
        parse_search_space([text], FLAGS)
    sentence, printed, marker = str(error.value).split("\n")
    assert sentence.startswith(f"--search: {message}")
    assert (printed, marker) == (f"  {text}", f"  {caret}")


def test_flag_in_two_texts_is_marked_in_the_second():
    with pytest.raises(UserError, match=r"searched twice\n  seed=choice\(2\)\n  \^$"):
        parse_search_space(["seed=choice(1)", "seed=choice(2)"], FLAGS)


def test_caret_below_wide_and_invisible_characters():
    with pytest.raises(UserError) as error:
        parse_search_space([f"{PROMPT}=choice(查询,\t查询)"], FLAGS)
    _, printed, marker = str(error.value).split("\n")
    assert printed == f"  {PROMPT}=choice(查询, 查询)"
    assert marker == "  " + " " * len(f"{PROMPT}=choice(") + "\u3000\u3000" + "  ^"


def test_flags_that_cannot_be_searched():
    """Every pattern rejects a flag that exists; the flags that are searched most are accepted."""
    commands = {**declared_flags(MineOptions), **FLAGS}
    rejected = {}
    for name, f in commands.items():
        try:
            parse_search_space([f"{name}=choice({f.choices[0] if f.choices else '1'})"], commands)
        except UserError as error:
            rejected[name] = str(error).splitlines()[0]
    for reason in NOT_SEARCHED.values():
        assert any(message.endswith(reason) for message in rejected.values()), reason
    searched = set(commands) - set(rejected)
    assert searched >= set(
        "learning_rate temperature warmup_ratio weight_decay num_train_epochs max_steps per_device_train_batch_size "
        "global_batch_size train_group_size query_max_len passage_max_len lr_scheduler_type optim adam_beta2 seed "
        "lora_rank lora_alpha lora_dropout use_lora false_negative_margin kd_loss_type pooling_method "
        "negative_number range_for_sampling relative_margin absolute_margin query_instruction_for_retrieval".split()
    )
    assert not searched & set(
        "output_dir storage_path cache_dir output_file input_file train_data eval_data config address token "
        "num_workers cpus_per_worker use_gpu model_name_or_path logging_steps save_steps resume verbose".split()
    )


# --- properties -------------------------------------------------------------------------------------------------------

BY_KIND = {"float": "learning_rate", "int": "train_group_size", "str": PROMPT, "bool": "use_lora"}
FLOATS = st.floats(-1e300, 1e300)
WHOLES = st.integers(-(2**40), 2**40)


@st.composite
def searches(draw):
    """Generate a flag and a domain that is valid for it."""
    kind = draw(st.sampled_from(sorted(BY_KIND)))
    functions = {"float": sorted(FUNCTIONS), "int": ["randint", "lograndint", "choice", "grid"]}
    function = draw(st.sampled_from(functions.get(kind, ["choice", "grid"])))
    if FUNCTIONS[function] is None:
        values = {"float": FLOATS, "int": WHOLES, "str": st.text(max_size=9), "bool": st.booleans()}[kind]
        arguments = draw(st.lists(values, min_size=1, max_size=5, unique=True))
    elif function == "quniform":
        q = draw(st.floats(1e-9, 1e9))
        lo, hi = sorted(draw(st.lists(st.integers(-(10**6), 10**6), min_size=2, max_size=2, unique=True)))
        arguments = [lo * q, hi * q, q]
    else:
        numbers = WHOLES if function in ("randint", "lograndint") else FLOATS
        lo, hi = draw(st.lists(numbers, min_size=2, max_size=2, unique=True).map(sorted))
        assume(lo > 0 or "log" not in function)
        arguments = [lo, hi]
    return BY_KIND[kind], Domain(function, tuple(arguments))


@given(searches())
def test_written_domain_parses_to_an_equal_one(search):
    name, domain = search
    again = parse_search_space([f"{name}={domain}"], FLAGS)[name]
    assert again == domain and list(map(type, again.arguments)) == list(map(type, domain.arguments))


@given(searches(), st.integers(0, 2**31))
def test_samples_of_ray_are_in_the_domain(search, seed):
    _, domain = search
    ray = domain.to_ray()
    if domain.grid:
        assert ray == {"grid_search": list(domain.arguments)}
        values = ray["grid_search"]
    else:
        values = [ray.sample(random_state=seed + i) for i in range(5)]
    for value in values:
        assert value in domain
        assert build_options(TrainOptions, {**REQUIRED, search[0]: value})  # and the flag accepts it


REQUIRED = {"model_name_or_path": "m", "train_data": "a", "output_dir": "o"}


def test_samples_of_ray_reach_both_ends():
    """quniform samples hi, randint and lograndint do not."""

    def samples(word):
        domain = parse_search_space([word], FLAGS)["learning_rate"].to_ray()
        return {domain.sample(random_state=seed) for seed in range(200)}

    assert samples("learning_rate=randint(1,4)") == {1, 2, 3}
    assert samples("learning_rate=lograndint(1,4)") == {1, 2, 3}
    assert samples("learning_rate=quniform(1,2,0.5)") == {1.0, 1.5, 2.0}
    assert samples("learning_rate=choice(1,2)") == {1.0, 2.0}


@pytest.mark.parametrize(
    ("word", "inside", "outside"),
    [
        ("learning_rate=uniform(1,2)", [1, 1.5, 2.0], [0.999, 2.001, math.nan, math.inf, "1", True, None]),
        ("learning_rate=loguniform(1e-6,1e-4)", [1e-6, 5e-5, 1e-4], [9e-7, 1.1e-4, 0]),
        ("learning_rate=quniform(1,2,0.1)", [1.0, 1.3, 2.0], [1.25, 0.9, 2.1]),
        ("seed=randint(1,4)", [1, 3, 3.0], [4, 0, 1.5, math.nan, math.inf, True]),
        ("seed=choice(1,2)", [1, 2], [3, True, "1"]),
        ("use_lora=choice(True)", [True], [1, False]),
        ("kd_loss_type=grid(kl_div)", ["kl_div"], ["m3_kd_loss", None]),
    ],
)
def test_membership(word, inside, outside):
    (domain,) = parse_search_space([word], FLAGS).values()
    assert all(value in domain for value in inside)
    assert not any(value in domain for value in outside)


def test_properties():
    def properties(function, arguments):
        d = Domain(function, arguments)
        return {name for name in ("grid", "categorical", "continuous", "log", "whole") if getattr(d, name)}

    assert properties("uniform", (0.0, 1.0)) == {"continuous"}
    assert properties("loguniform", (0.1, 1.0)) == {"continuous", "log"}
    assert properties("quniform", (0.0, 1.0, 0.5)) == set()
    assert properties("randint", (0, 9)) == {"whole"}
    assert properties("lograndint", (1, 9)) == {"whole", "log"}
    assert properties("choice", (1, 2)) == {"categorical"}
    assert properties("grid", (1, 2)) == {"categorical", "grid"}
    assert (Domain("randint", (1, 9)).lo, Domain("randint", (1, 9)).hi) == (1, 9)


def test_parsing_imports_no_ray_and_no_torch():
    code = (
        "import sys\n"
        "from raybge.cli.options import TrainOptions\n"
        "from raybge.cli.parser import declared_flags\n"
        "from raybge.tuning.search_space_parser import parse_search_space\n"
        "parse_search_space(['seed=choice(1)'], declared_flags(TrainOptions))\n"
        "assert not {'ray', 'torch'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
