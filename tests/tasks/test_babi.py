import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sparsemem.tasks import BabiTask
from sparsemem.tasks.babi import plan_epoch

SLACK = 4  # for shared machines; loading takes 0.17 s and a batch 1 ms on a quiet one


def story(length, answer):
    """A story of `length` statements, one question of one or several words."""
    lines = [f"{n} Mary has milk.\n" for n in range(1, length + 1)]
    return "".join(lines) + f"{length + 1} What has Mary?\t{answer}\t1\n"


@pytest.fixture
def folder(tmp_path):
    """Task 1 with 20 train and 5 test stories, task 2 with 10 and 3, of growing length."""
    (tmp_path / "en").mkdir()
    for task, train, test in ((1, 20, 5), (2, 10, 3)):
        for part, number in (("train", train), ("test", test)):
            answer = "milk" if task == 1 else "Milk,apple"
            text = "".join(story(length, answer) for length in range(1, number + 1))
            (tmp_path / "en" / f"qa{task}_x_{part}.txt").write_text(text)
    return tmp_path


def build(folder, **options):
    return BabiTask(
        **{"path": folder, "variant": "en", "tasks": [1, 2], "batch_size": 4, **options}
    )


def words(task, batch, row=0):
    """What the network is shown, as text."""
    shown = batch.input[row][batch.input[row].any(1)]
    assert (shown.sum(1) == 1).all()
    return " ".join(task.vocabulary[i] for i in shown.argmax(1))


def answers(task, batch, row=0):
    return [task.vocabulary[i] for i in batch.target[row][batch.mask[row]]]


def perfect(task, batch):
    return torch.nn.functional.one_hot(batch.target, task.output_size).float()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_encoding_pads_at_the_end(folder):
    task = build(folder, tasks=2)
    batch = task.encode([task.stories["test"][0], task.stories["test"][2]])
    assert task.vocabulary == ("-", ".", "?", "apple", "has", "mary", "milk", "what")
    assert words(task, batch, 0) == "mary has milk . what has mary ? - -"
    assert words(task, batch, 1) == "mary has milk . " * 3 + "what has mary ? - -"
    assert batch.input.shape == (2, 18, 8)
    assert not batch.input[0, 10:].any()
    assert batch.mask.nonzero().tolist() == [[0, 8], [0, 9], [1, 16], [1, 17]]
    assert answers(task, batch) == ["milk", "apple"]
    assert build(folder, dtype="float64").batch(0).input.dtype == torch.float64


def test_splits(folder):
    task = build(folder, validation_fraction=0.2)
    assert {split: len(stories) for split, stories in task.stories.items()} == {
        "train": 24, "validation": 6, "test": 8,
    }  # fmt: skip
    apart = [(s.task, s.sentences) for s in task.stories["validation"]]
    assert not set(apart) & {(s.task, s.sentences) for s in task.stories["train"]}
    assert [task for task, _ in apart] == [1, 1, 1, 1, 2, 2]
    # Neither the seed nor the choice of tasks changes the validation part of a task.
    alone = build(folder, validation_fraction=0.2, tasks=[2], seed=9)
    assert [(s.task, s.sentences) for s in alone.stories["validation"]] == apart[4:]


def test_an_epoch_shows_each_story_once(folder):
    task = build(folder, batch_size=5, validation_fraction=0.2)
    assert task.batches_per_epoch == 5
    epochs = [
        sorted(words(task, b, row) for b in batches for row in range(len(b.input)))
        for batches in ([task.batch(i) for i in range(e * 5, e * 5 + 5)] for e in range(2))
    ]
    assert len(epochs[0]) == 24
    assert epochs[0] == epochs[1]
    assert not all(same(task.batch(i), task.batch(5 + i)) for i in range(5))  # other order


def test_batch_is_a_pure_function(folder):
    task, other = build(folder), build(folder)
    forward = [task.batch(i) for i in range(20)]
    assert all(same(other.batch(i), forward[i]) for i in reversed(range(20)))
    different = build(folder, seed=1)
    assert not all(same(different.batch(i), forward[i]) for i in range(7))
    test = task.with_split("test")
    assert test.batches_per_epoch == 2
    assert same(test.batch(0), build(folder, split="test").batch(0))
    assert same(task.batch(0), forward[0])


def test_loader_with_workers(folder):
    task = build(folder)
    loader = iter(DataLoader(task, batch_size=None, num_workers=2))
    assert all(same(next(loader), task.batch(i)) for i in range(10))


def test_evaluation_takes_all_stories_in_the_same_order(folder):
    task, other = build(folder), build(folder, seed=3)
    batches, others = (list(t.evaluation_batches("test")) for t in (task, other))
    assert sum(len(batch.input) for batch in batches) == 8
    assert all(same(a, b) for a, b in zip(batches, others, strict=True))
    assert len(list(task.evaluation_batches("test", 1))) == 1


def test_metric_counts_questions(folder):
    task = build(folder, tasks=[2])
    batch = task.encode(task.stories["test"])
    output = perfect(task, batch)
    assert task.metric(output, batch) == 0
    assert task.metric(-output, batch) == 1
    output[0, 9] *= -1  # one of two words wrong: the question is wrong
    assert task.score(output, batch) == (1, 3)
    output[0, 8] *= -1  # both words wrong: still one question
    assert task.metric(output, batch) == pytest.approx(1 / 3)
    output[1, 0] *= -1  # does not count
    output[2, 16] *= -1
    assert task.metric(output, batch) == pytest.approx(2 / 3)


def test_several_questions_a_story_count_apart(folder):
    (folder / "en/qa1_x_test.txt").write_text(
        "1 Mary has milk.\n2 What has Mary?\tmilk,apple\n3 What has Mary?\tmilk\n"
    )
    task = build(folder, tasks=[1])
    batch = task.encode(task.stories["test"])
    output = perfect(task, batch)
    assert task.score(output, batch) == (0, 2)
    assert task.score(-output, batch) == (2, 2)
    output[0, 14] *= -1
    assert task.score(output, batch) == (1, 2)


def test_loss_is_the_mean_over_answer_words(folder):
    task = build(folder, dtype="float64")
    batch = task.batch(0)
    output = torch.randn(*batch.target.shape, task.output_size, dtype=torch.float64)
    chances = output.softmax(2).gather(2, batch.target[..., None])[..., 0]
    expected = -chances[batch.mask].log().mean()
    torch.testing.assert_close(task.loss(output, batch), expected)
    total = task.normaliser(batch)
    parts = [
        task.loss(output[:, t : t + 7], batch.steps(t, t + 7), total)
        for t in range(0, batch.target.shape[1], 7)
    ]
    torch.testing.assert_close(sum(parts), expected)


def test_parts_are_each_task_alone_with_the_words_of_all(folder):
    task = build(folder)
    task.batch(0)  # plans an epoch, which the parts must not share
    parts = task.parts()
    assert list(parts) == ["task 1", "task 2"]
    for number, part in enumerate(parts.values(), 1):
        assert part.identity == task.identity
        assert part.max_level == task.max_level
        stories = {id(s) for s in task.stories["test"] if s.task == number}
        assert {id(s) for s in part.stories["test"]} == stories
        shown = list(part.evaluation_batches("test"))
        assert sum(len(batch.input) for batch in shown) == len(stories) == {1: 5, 2: 3}[number]
        assert all(("apple" in answers(task, batch)) == (number == 2) for batch in shown)
        assert len(part.batch(0).input) == 4


def test_identity_is_that_of_the_word_ids(folder):
    one = build(folder, tasks=[1])
    assert len(one.identity) == 64
    assert one.identity == build(folder, tasks=[1], seed=4, batch_size=2).identity
    before = one.identity
    for part in ("train", "test"):
        file = folder / "en" / f"qa1_x_{part}.txt"
        file.write_text(file.read_text().replace("milk", "wine"))
    other = build(folder, tasks=[1])
    assert len(other.vocabulary) == len(one.vocabulary)
    assert other.identity != before


def test_long_stories_are_skipped_counted_and_reported(folder):
    with pytest.warns(UserWarning, match="skipped .*: 16 train, 0 validation, 1 test"):
        task = build(folder, tasks=[1], max_sentences=5, validation_fraction=0.0)
    assert task.skipped == {"train": 16, "validation": 0, "test": 1}
    assert max(s.sentences for stories in task.stories.values() for s in stories) == 5


def test_max_words(folder):
    with pytest.warns(UserWarning, match="skipped"):
        task = build(folder, tasks=[1], max_words=13, validation_fraction=0.0)
    assert sorted({len(s.words) for s in task.stories["train"]}) == [9, 13]
    assert task.skipped == {"train": 18, "validation": 0, "test": 3}
    assert task.vocabulary == build(folder, tasks=[1]).vocabulary


def test_substitute_for_task_3(folder):
    (folder / "en/qa3_x_test.txt").write_text(story(2, "milk"))
    with pytest.raises(FileNotFoundError, match=r"lacks en/qa3_\*_train.txt; qa3_path can supply"):
        build(folder, tasks=[1, 3])
    other = folder / "other.txt"
    other.write_text(story(3, "milk") + story(4, "milk"))
    task = build(folder, tasks=[3], qa3_path=other, validation_fraction=0.0)
    assert [s.sentences for s in task.stories["train"]] == [4, 5]
    assert task.sources[0] == str(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, r"tasks is \[\], expected different numbers from 1 to 20"),
        ({"tasks": [0]}, r"tasks is \[0\], expected different numbers from 1 to 20"),
        ({"tasks": [1, 1]}, r"tasks is \[1, 1\], expected different numbers"),
        ({"tasks": 21}, "tasks is 21, expected different numbers"),
        ({"tasks": "all"}, "tasks is 'all', expected different numbers"),
        ({"tasks": None}, "tasks is None, expected different numbers"),
        ({"tasks": [4]}, r"lacks en/qa4_\*_train.txt, en/qa4_\*_test.txt$"),
        ({"variant": "en-1k"}, "variant is 'en-1k', .*known: en, en-10k"),
        ({"validation_fraction": 2}, "validation_fraction is 2, expected a number from 0 to 1"),
        ({"validation_fraction": 1}, "no story is left .* validation_fraction = 1"),
        ({"max_words": 0}, "max_words is 0, expected at least 1"),
        ({"max_sentences": 1}, "no story is left to train or to test on, with .*sentences': 1"),
        ({"path": "nowhere"}, "path is 'nowhere', which does not exist"),
        ({"path": 5}, "path is 5, expected the path of the bAbI archive or folder"),
        ({"qa3_path": 5}, "qa3_path is 5, expected the path of a training file"),
        ({"split": "valid"}, "split is 'valid', expected one of"),
    ],
)
def test_bad_options(folder, options, message, plain_errors):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        build(folder, **options)


def test_the_level_cuts_stories_behind_a_question(tmp_path):
    (tmp_path / "en").mkdir()
    lines = ["1 Mary has milk.", "2 What has Mary?\tmilk\t1", "3 Mary has tea.", "4 Mary ran."]
    lines += ["5 What has Mary?\ttea\t3", "6 Ann has ale.", "7 What has Ann?\tale\t6"]
    for part in ("train", "test"):
        (tmp_path / "en" / f"qa1_x_{part}.txt").write_text("\n".join(lines) + "\n")
    task = BabiTask(path=tmp_path, variant="en", tasks=1, batch_size=1, validation_fraction=0.0)
    assert task.level == task.min_level == task.max_level == 3
    whole = task.batch(0)
    assert torch.equal(task.batch(0, 4).input, whole.input)
    assert answers(task, task.batch(0, 2)) == ["milk", "tea"]
    assert words(task, task.batch(0, 1)) == "mary has milk . what has mary ? -"
    shown = next(task.evaluation_batches("test", level=2))
    assert words(task, shown).endswith("mary ran . what has mary ? -")
    for cut, full in zip(shown, whole, strict=True):
        assert torch.equal(cut, full[:, : cut.shape[1]])


def test_bad_calls(folder, plain_errors):
    task = build(folder, validation_fraction=0.0)
    with pytest.raises(ValueError, match="level is 0, expected at least 1"):
        task.batch(0, 0)
    message = r"split is 'validation', which has no stories \(validation_fraction is 0.0\)"
    with pytest.raises(ValueError, match=message):
        task.evaluation_batches("validation")
    with pytest.raises(ValueError, match=message):
        task.with_split("validation").batch(0)
    with pytest.raises(ValueError, match="split is 'dev'"):
        task.evaluation_batches("dev")


def test_bad_line_names_file_and_line(folder):
    (folder / "en/qa2_x_test.txt").write_text(story(2, "milk") + "2 Mary has milk.\n")
    with pytest.raises(ValueError, match=r"qa2_x_test.txt, line 4: sentence number is 2, expected"):
        build(folder)


def test_plan_keeps_lengths_together():
    lengths = np.random.default_rng(0).integers(5, 500, 1003)
    plan = plan_epoch(lengths, 8, np.random.default_rng(1))
    assert sorted(np.concatenate(plan).tolist()) == list(range(1003))
    assert sorted(map(len, plan)) == [3] + [8] * 125
    longest = np.array([lengths[rows].max() * len(rows) for rows in plan])
    assert lengths.sum() / longest.sum() > 0.85  # by chance: 0.56
    firsts = [lengths[rows].mean() for rows in plan]
    assert abs(np.corrcoef(np.arange(len(plan)), firsts)[0, 1]) < 0.3  # batches are in no order


# The real data -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(data_dir):
    folder = data_dir / "babi"
    substitute = folder / "qa3_three-supporting-facts_train_10k.txt.xz"
    return BabiTask(path=folder, qa3_path=substitute, batch_size=16)


def questions(task, *splits):
    counts = dict.fromkeys(task.tasks, 0)
    for split in splits:
        for one in task.stories[split]:
            counts[one.task] += len(one.answers)
    return counts


def test_every_real_file_parses_with_all_its_questions(real):
    assert questions(real, "test") == dict.fromkeys(range(1, 21), 1000)
    assert questions(real, "train", "validation") == dict.fromkeys(range(1, 21), 10000)
    assert len(real.stories["test"]) == 6267
    assert len(real.sources) == 40


def test_real_vocabulary_is_that_of_the_dnc_paper(real):
    # Graves et al. 2016, Methods: "a lexicon of 156 unique words and three punctuation symbols".
    assert len(real.vocabulary) == 156 + 3
    assert real.vocabulary[:3] == ("-", ".", "?")


def test_the_smaller_variant(data_dir):
    task = BabiTask(path=data_dir / "babi/babi_tasks_1-20_v1-2_en.tar.xz", variant="en")
    assert questions(task, "test") == dict.fromkeys(range(1, 21), 1000)
    assert questions(task, "train", "validation") == dict.fromkeys(range(1, 21), 1000)


def test_a_known_story(data_dir):
    task = BabiTask(path=data_dir / "babi", tasks=8)
    first = task.encode([task.stories["test"][0]])
    assert words(task, first) == (
        "mary got the milk there . john moved to the bedroom . what is mary carrying ? - "
        "john picked up the football there . john journeyed to the bathroom . "
        "what is john carrying ? - john went to the garden . daniel went back to the hallway . "
        "what is john carrying ? - john went back to the bathroom . mary went to the office . "
        "sandra went back to the kitchen . mary travelled to the hallway . "
        "john travelled to the bedroom . john picked up the apple there . "
        "what is john carrying ? - - sandra travelled to the bedroom . "
        "sandra journeyed to the kitchen . what is john carrying ? - -"
    )
    assert answers(task, first) == [
        "milk", "football", "football", "football", "apple", "football", "apple",
    ]  # fmt: skip
    assert task.score(torch.zeros(1, first.input.shape[1], task.output_size), first)[1] == 5


def test_the_missing_training_file(data_dir):
    with pytest.raises(FileNotFoundError) as error:
        BabiTask(path=data_dir / "babi", tasks=[1, 3])
    assert "lacks en-10k/qa3_*_train.txt; qa3_path can supply another file" in str(error.value)


def test_speed(data_dir, real):
    start = time.perf_counter()
    BabiTask(path=data_dir / "babi", tasks=1)
    loaded = time.perf_counter()
    real.batch(0)
    begun = time.perf_counter()
    for index in range(1, 41):
        real.batch(index)
    assert loaded - start < 0.5 * SLACK
    assert (time.perf_counter() - begun) / 40 < 0.005 * SLACK
