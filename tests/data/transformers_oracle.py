"""What transformers makes of a folder's tokenizer and chat template; runs in .venv-peers.

python transformers_oracle.py FOLDER QUESTIONS.json ANSWERS.json
"""

import json
import sys

from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]


def main(folder: str, questions: str, answers: str) -> None:
    """Ids of texts and what they decode to; the text, ids and mask of conversations, and the text that asks."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(questions) as file:
        asked = json.load(file)
    told = {
        "kind": type(tokenizer).__mro__[1].__name__,
        "padded": tokenizer(["a", "a b c"], padding=True)["input_ids"],
        "ids": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "decoded": [tokenizer.decode(ids) for ids in asked["ids"]],
        "chats": [],
    }
    for chat in asked["chats"]:
        encoded = tokenizer.apply_chat_template(
            chat["finished"],
            tools=chat["tools"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        text = tokenizer.apply_chat_template(
            chat["messages"], tools=chat["tools"], tokenize=False, add_generation_prompt=True, **chat["variables"]
        )
        told["chats"].append({"ids": encoded["input_ids"], "mask": encoded["assistant_masks"], "text": text})
    with open(answers, "w") as file:
        json.dump(told, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
