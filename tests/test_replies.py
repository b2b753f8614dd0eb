"""What a model's reply to a question with options chooses, and which replies choose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from xattn_video_pipelines.qa.questions import LETTERS, Question, conclusion

FOUR = Question("q", Path(), "Which?", ("a cat", "a dog", "the red bird", "none of these"), "B")

REPLIES = [
    # a letter alone or in front
    ("B", "B"),
    ("b", "B"),
    (" B.\n", "B"),
    ("(B)", "B"),
    ("[b]", "B"),
    ("**B**", "B"),
    ("B) a dog", "B"),
    ("B. The dog is on the left, and A is wrong.", "B"),
    ("B: a dog", "B"),
    ("b) a dog", "B"),
    ("B\n\nExplanation: a dog barks.", "B"),
    # reasoning
    ("<think>Option A is wrong...</think>\n\nB", "B"),
    ("<think>\nThe answer is A? No.\n</think>\nThe answer is B.", "B"),
    ("Option A looks right.</think>B", "B"),
    ("<thinking>A, A, A</thinking> (B)", "B"),
    ("<think>A</think>C<think>D</think>B", "B"),
    ("<think>The answer is A, because", None),
    ("B<think>is it A", "B"),
    ("<think>B</think>", None),
    # an explicit answer
    ("It is not A, the answer is B", "B"),
    ("answer: b", "B"),
    ("Answer: B", "B"),
    ("The answer is B, not A.", "B"),
    ("A. The cat is asleep, so the answer is B.", "B"),
    ("The answer is A. Wait, the bird is gone: the answer is B.", "B"),
    ("The correct answer is: **B**", "B"),
    ("The answer is option b.", "B"),
    ("The answer should therefore be (B).", "B"),
    ("The right answer is most likely B because it barks. C is red.", "B"),
    ("Final Answer\n\nB", "B"),
    ('{"answer": "B"}', "B"),
    ("<answer>B</answer>", "B"),
    ("We get $\\boxed{B}$ and not A", "B"),
    ("$\\boxed{\\text{B}}$", "B"),
    ("\u7b54\u6848\u662fB\u3002", "B"),
    ("The answer to question A is B", "B"),
    ("The answer is A or B.", None),
    ("The answer is a dog", None),
    # the text of an option
    ("A dog.", "B"),
    ("red bird", "C"),
    ("<think>A</think>The red bird!", "C"),
    # the last letter that stands alone
    ("rules out C, leaving B", "B"),
    ("This rules out A and C, so B", "B"),
    ("option b", "B"),
    ("I would take option b, since it barks", "B"),
    ("I'd say (b)", "B"),
    ("It is B, I think", "B"),
    ("B is the answer.", "B"),
    ("It can't be A. It isn't C either. B", "B"),
    ("Neither A nor C, so B", "B"),
    ("Not A but B", "B"),
    ("It is B rather than A", "B"),
    ("B fits, whereas A is wrong and C cannot be true", "B"),
    ("Option B is right, option A is not.", "B"),
    ("A and C are incorrect. Therefore B", "B"),
    ("I don't think it is A; B", "B"),
    ("Between A and B, I choose B", "B"),
    ("The person in Apartment B holds a dog. A", "A"),
    ("It is A: the person in Apartment B holds a cat", "A"),
    ("Vitamin C is no animal, so B", "B"),
    ("In Room D there is a dog: B", "B"),
    ("A is right", "A"),
    ("A dog is running, so B", "B"),
    ("- A cat runs\n- so B", "B"),
    ("A. wrong\nB. right\nSo it is B", "B"),
    ("The U.S.A. has dogs: B", "B"),
    ("It was written in C++, so B", "B"),
    ("Let's see. A: the cat is asleep. B: the dog runs. The question is which runs. Hence B.", "B"),
    ("Option B (a dog) is correct, while options A, C, and D are incorrect.", "B"),
    ("Option A: no dog. Option B: a dog barks. Best: Option B", "B"),
    ("B (a dog) is right. A (a cat) is wrong.", "B"),
    ("Since the cat (A) does not appear, and the bird (C) is absent, B.", "B"),
    ("The correct answer isn't A; it's B.", "B"),
    ("Correct answer: B. Explanation: a dog is shown in Scene A", "B"),
    ("I believe the answer to be B.", "B"),
    ("None of A, C or D: B", "B"),
    ("b - a dog", "B"),
    ("A is not correct, B is not correct, D is correct", "D"),
    # nothing that could be read
    ("Definitely not B", None),
    ("", None),
    ("...", None),
    ("Both", None),
    ("E", None),
    ("A cat is sitting", None),
    ("It could be A or B", None),
    ("A, B", None),
    ("A/B", None),
    ("A. a cat\nB. a dog", None),
    ("A) a cat B) a dog", None),
    ("It is not A.", None),
    ("He is in Apartment B.", None),
    ("I cannot tell.", None),
]


@pytest.mark.parametrize(("reply", "letter"), REPLIES)
def test_the_choice_of_a_reply(reply: str, letter: str | None) -> None:
    assert FOUR.chosen(reply) == letter
    assert FOUR.unreadable(reply) is (letter is None)
    assert FOUR.right(reply) is (letter == "B")


def test_the_pronoun_is_no_choice_among_nine() -> None:
    nine = Question("q", Path(), "Which?", tuple(f"a{letter}" for letter in LETTERS[:9]), "B")
    assert nine.chosen("Answer: I think B") == "B"
    assert nine.chosen("It must be I") == "I"
    assert nine.chosen("I am not sure") is None


def test_without_options_what_comes_after_the_reasoning_counts() -> None:
    free = Question("q", Path(), "Which?", answer="the red circle")
    assert free.right("<think>Is it blue? No.</think>\nA red circle.") is True
    assert free.same("<think>Is it blue?</think>red", "red")
    assert not free.unreadable("blue")
    assert free.unreadable("<think>red circle")
    assert free.right("<think>red circle") is False
    assert conclusion("so</think> it <think>is") == "it"


@pytest.mark.timeout(30)
def test_a_long_reply_is_read_at_once() -> None:
    """No pattern may try all ways to share out long runs of spaces or letters."""
    for part in (" ", "A, ", "A and ", "not ", "the ", "answer is ", "(", "option "):
        FOUR.chosen("not " + 3000 * part)
