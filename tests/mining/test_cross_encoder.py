"""Threads of an actor with a GPU share the cross-encoder: one tokenizes while another one scores."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from raybge.mining import cross_encoder
from raybge.mining.cross_encoder import CrossEncoderScorer
from raybge.model.spec import RerankerSpec
from raybge.search.store import Store


class SlowReranker:
    """Scores only while another thread tokenizes; fails if two threads do the same thing at a time."""

    def __init__(self) -> None:
        self.tokenizing, self.scoring = threading.Lock(), threading.Lock()
        self.second_tokenizes, self.calls = threading.Event(), 0

    def tokenize(self, pairs):
        assert self.tokenizing.acquire(blocking=False)
        self.calls += 1
        if self.calls == 2:
            self.second_tokenizes.set()
        self.tokenizing.release()
        return [(query, passage) for query, passage in pairs]

    def score_tokens(self, tokens, normalize):
        assert self.scoring.acquire(blocking=False)
        assert self.second_tokenizes.wait(60)
        self.scoring.release()
        return np.array([len(query) + len(passage) for query, passage in tokens], np.float32)


def test_one_thread_tokenizes_while_another_one_scores(tmp_path, monkeypatch):
    model = SlowReranker()
    monkeypatch.setattr(cross_encoder, "_load_model", lambda *_: model)
    scorer = CrossEncoderScorer(RerankerSpec("m"), "identity", Store(str(tmp_path)), 1, "cpu")
    blocks = [[("a" * n, "b")] for n in range(1, 4)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(scorer.scores, blocks))
    assert [scores.tolist() for scores in found] == [[2], [3], [4]] and model.calls == 3
