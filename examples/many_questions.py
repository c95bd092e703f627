"""Many questions about one document: it is read once, and each question continues a copy."""

from pydoc_data.topics import topics

import icecache
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "Which operations do all sequence types share?",
    "What happens if an index is out of range?",
)
folder = icecache.models.smollm2()  # or a folder with a model of your own
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
icecache.enable(model, token_budget=256)

document = f"<|im_start|>user\n{topics['typesseq'][:6000]}\n"
ids = tokenizer(document, return_tensors="pt").input_ids
with torch.inference_mode():
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

for question in QUESTIONS:
    asked = f"{question}<|im_end|>\n<|im_start|>assistant\n"
    prompt = torch.cat([ids, tokenizer(asked, return_tensors="pt").input_ids], 1)
    fork = cache.fork()  # shares all pages of the document
    answer = model.generate(prompt, past_key_values=fork, max_new_tokens=24, do_sample=False)
    print(f"{question} {tokenizer.decode(answer[0, prompt.shape[1] :])!r}")

memory = icecache.stats(model).memory
print(f"pages of the document and of all copies that live: {memory.pool_bytes / 2**20:.0f} MiB")
