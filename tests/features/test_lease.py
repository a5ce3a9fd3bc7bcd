import json
import os
import time

import pytest
from object_server import ObjectServer

from regvit.durable import FolderLocked
from regvit.features.lease import Lease
from regvit.features.storage import Bucket


@pytest.fixture(scope="module")
def server():
    with ObjectServer() as server:
        yield server


@pytest.fixture
def bucket(server, request):
    return Bucket(f"{server.url}/{request.node.name}", server.options)


def test_a_second_one_is_refused_until_the_first_gives_it_back(bucket):
    first, second = Lease(bucket), Lease(bucket)
    first.acquire()
    with pytest.raises(FolderLocked, match=rf"is being written by process {os.getpid()} on .*, last heard of \d s ago"):
        second.acquire()
    first.check()
    first.release()
    second.acquire()
    second.release()
    assert not bucket.exists()


def test_it_outlasts_its_seconds_while_it_is_renewed(bucket):
    holder = Lease(bucket, seconds=4)  # server clocks count whole seconds
    holder.acquire()
    time.sleep(6)
    with pytest.raises(FolderLocked, match="is being written by"):
        Lease(bucket, seconds=4).acquire()
    holder.check()
    holder.release()


def silent(bucket, **content):
    """A lease whose holder was killed."""
    bucket.put("owner", json.dumps({"holder": "process 7 on elsewhere", "token": "t", "beat": 3} | content).encode())


def test_one_whose_holder_fell_silent_is_taken_over(bucket):
    silent(bucket)
    taker = Lease(bucket, seconds=2)
    with pytest.raises(
        FolderLocked, match=r"by process 7 on elsewhere, .*; wait for it, or, if it was killed, run again in [12] s"
    ):
        taker.acquire()
    time.sleep(3.1)
    taker.acquire()
    assert json.loads(bucket.get("owner").content)["holder"].startswith(f"process {os.getpid()} on ")
    taker.release()


def test_a_holder_that_was_taken_over_learns_it_and_leaves_the_other_alone(bucket):
    holder = Lease(bucket, seconds=2)
    holder.acquire()
    silent(bucket)
    time.sleep(1.5)
    with pytest.raises(FolderLocked, match="another process took it over; run it again"):
        holder.check()
    holder.release()
    assert json.loads(bucket.get("owner").content)["holder"] == "process 7 on elsewhere"


def test_of_two_that_take_over_at_once_one_is_refused(bucket, monkeypatch):
    silent(bucket)
    time.sleep(3.1)
    slow, quick = Lease(bucket, seconds=2), Lease(bucket, seconds=2)
    look = slow._server_time

    def overtaken():
        quick.acquire()
        return look()

    monkeypatch.setattr(slow, "_server_time", overtaken)
    with pytest.raises(FolderLocked, match="has just been taken over from process 7 on elsewhere by another process"):
        slow.acquire()
    quick.check()
    quick.release()


def test_a_renewal_whose_answer_was_lost_is_not_taken_for_a_take_over(bucket, monkeypatch):
    """obstore sends such a request again, and the second one then finds the first's object there."""
    holder, replace = Lease(bucket, seconds=2), Bucket.replace

    def twice(self, key, content, tag):
        replace(self, key, content, tag)
        return replace(self, key, content, tag)

    holder.acquire()
    monkeypatch.setattr(Bucket, "replace", twice)
    time.sleep(1.5)
    holder.check()
    holder.release()


def test_a_lease_that_cannot_be_renewed_is_given_up(bucket, monkeypatch):
    def unreachable(*_):
        raise FileNotFoundError("no answer")

    holder = Lease(bucket, seconds=1)
    holder.acquire()
    monkeypatch.setattr(Bucket, "replace", unreachable)
    time.sleep(2)
    with pytest.raises(FolderLocked, match=r"it could not be renewed for 1 s \(no answer\)"):
        holder.check()
    holder.release()
