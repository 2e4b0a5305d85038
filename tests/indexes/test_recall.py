import torch

from sparsemem.indexes.base import Found
from sparsemem.indexes.derivation import Setting, ladder
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.recall import (
    OF_A_BATCH,
    SAMPLE,
    WATCHED,
    QuerySample,
    Watch,
    harder,
    recall,
    tune,
)


def found(scores, ids) -> Found:
    return Found(torch.tensor(scores), torch.tensor(ids))


def test_recall_counts_what_is_as_good_as_the_truth():
    truth = found([[0.9, 0.8, 0.8], [0.5, 0.4, 0.3]], [[1, 2, 3], [4, 5, 6]])
    # In the first query row 7 ties with the last true one; in the second one is missing.
    other = found([[0.9, 0.8, 0.8], [0.5, 0.3, 0.2]], [[1, 3, 7], [4, 6, 9]])
    assert recall(truth, truth, Metric.cosine) == 1.0
    assert recall(other, truth, Metric.cosine) == 5 / 6


def test_recall_counts_the_same_rows_however_their_scores_were_rounded():
    truth = found([[0.9, 0.8], [0.5, 0.4]], [[2, 1], [4, 5]])
    other = found([[0.9, 0.7999999], [0.5, 0.3999999]], [[2, 1], [4, 6]])
    assert recall(other, truth, Metric.ip) == 3 / 4


def test_recall_of_distances_and_of_missing_rows():
    inf = torch.inf
    truth = found([[1.0, 2.0, inf]], [[3, 5, -1]])
    assert recall(found([[1.0, 2.0, inf]], [[3, 5, -1]]), truth, Metric.l2) == 1.0
    assert recall(found([[2.0, 2.5, 3.0]], [[5, 8, 9]]), truth, Metric.l2) == 0.5
    nothing = found([[inf, inf]], [[-1, -1]])
    assert recall(nothing, nothing, Metric.l2) == 1.0


def test_recall_of_what_counts():
    truth = found([[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]], [[1, 2, 3], [4, 5, 6]])
    other = found([[0.9, 0.7, 0.6], [0.4, 0.3, 0.2]], [[1, 3, 7], [5, 6, 9]])
    counts = torch.tensor([0.8, 0.6])  # two of the first query's; of the second's the best alone
    assert recall(other, truth, Metric.cosine) == 4 / 6
    assert recall(other, truth, Metric.cosine, counts) == 1 / 3
    assert recall(other, truth, Metric.cosine, torch.full((2,), -torch.inf)) == 4 / 6
    assert recall(truth, truth, Metric.cosine, counts) == 1.0
    near = found([[1.0, 2.0], [3.0, torch.inf]], [[1, 2], [3, -1]])
    far = found([[1.0, 5.0], [4.0, torch.inf]], [[1, 9], [8, -1]])
    assert recall(far, near, Metric.l2, torch.tensor([1.5, 9.0])) == 1 / 2
    assert recall(far, near, Metric.l2, torch.tensor([2.0, 9.0])) == 1 / 3


def test_the_ladder_climbs_to_its_limit():
    assert ladder(16) == [1, 2, 3, 4, 6, 8, 12, 16]
    assert ladder(1) == [1]
    assert ladder(5) == [1, 2, 3, 4, 5]


def test_tune_takes_the_cheapest_setting_that_will_do():
    seen = []

    def measure(setting):
        seen.append(setting)
        return min(1.0, setting.effort / 8)

    assert tune(measure, Setting(4, 1), 64, 0.7) == (Setting(6, 1), 0.75)
    assert seen[-1] == Setting(6, 1)


def test_tune_asks_for_more_candidates_where_looking_harder_does_not_help():
    def measure(setting):
        return min(0.6, setting.effort / 10) + 0.1 * min(4, setting.oversample)

    setting, reached = tune(measure, Setting(1, 1), 64, 0.9)
    assert (setting.oversample, round(reached, 6)) == (4, 1.0)
    setting, reached = tune(measure, Setting(1, 1), 64, 2.0)
    assert round(reached, 6) == 1.0  # the best there is


def test_the_sample_keeps_the_latest_queries_of_every_place():
    sample = QuerySample(torch.zeros(1), 1, torch.float32)
    assert len(sample.queries().queries) == 0
    for number in range(200):
        sample.add(torch.arange(10.0).unsqueeze(1) + 10 * number, k=5)
    kept = sample.queries().queries.flatten()
    assert len(kept) == SAMPLE
    assert int(kept.min()) >= 10 * (199 - SAMPLE // (OF_A_BATCH - 1))
    assert set((kept % 10).int().tolist()) == set(range(10))
    assert (sample.k, sample.seen) == (5, 2000)


def test_the_sample_fills_at_once_and_knows_the_greatest_k_in_it():
    sample = QuerySample(torch.zeros(1), 1, torch.float32)
    sample.add(torch.zeros(100, 1), k=3)
    assert len(sample) == 100
    sample.add(torch.zeros(100, 1), k=50)
    sample.add(torch.zeros(100, 1), k=2)
    assert (len(sample), sample.k) == (SAMPLE, 50)
    for _ in range(SAMPLE):
        sample.add(torch.zeros(8, 1), k=2)
    assert sample.k == 2


def test_a_sample_that_is_told_what_counts_keeps_such_queries_alone():
    sample = QuerySample(torch.zeros(1), 1, torch.float32)
    sample.add(torch.ones(100, 1), k=9)
    assert (sample.is_told, sample.queries().counts) == (False, None)
    for number in range(3):
        told = torch.arange(50.0) + 50 * number
        sample.tell(told.unsqueeze(1), 4, -told)
        sample.add(torch.ones(100, 1), k=9)
    queries, counts = sample.queries()
    assert len(queries.unique()) == len(queries)
    assert torch.equal(counts, -queries.flatten())
    assert (len(queries), sample.k, sample.seen) == (3 * 50 - 25, 4, 400)


def test_the_watch_waits_for_enough_queries_and_starts_again():
    watch = Watch()
    assert [watch.add(0.5, alarm=0.9) for _ in range(WATCHED // 2)][-2:] == [None, 0.5]
    assert watch.add(0.5, alarm=0.9) is None
    watch = Watch()
    assert all(watch.add(0.95, alarm=0.9) is None for _ in range(100))
    assert watch.add(0.7, alarm=0.9) is None  # 0.91 on average
    assert watch.add(0.7, alarm=0.9) is not None


def test_harder_climbs_and_stops_at_the_limit():
    assert harder(Setting(3, 2), 64, 1) == Setting(4, 2)
    assert harder(Setting(3, 2), 64, 2) == Setting(6, 2)
    assert harder(Setting(48, 1), 64, 5) == Setting(64, 1)
    assert harder(Setting(64, 1), 64, 1) == Setting(64, 1)
