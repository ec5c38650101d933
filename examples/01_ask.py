"""Ask a deployed model one question with the official OpenAI client.

Needs a running `cloudlm up`, and CLOUDLM_API_KEY set to the key that it showed.
"""

import os
import sys

from openai import OpenAI

if "CLOUDLM_API_KEY" not in os.environ:
    sys.exit("set CLOUDLM_API_KEY to the key that `cloudlm up` showed")
client = OpenAI(
    base_url=os.environ.get("CLOUDLM_GATEWAY_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ["CLOUDLM_API_KEY"],
)
answer = client.chat.completions.create(
    model="bank-helper",
    messages=[{"role": "user", "content": "My card has not arrived yet. What can I do?"}],
    temperature=0,
)
print(answer.choices[0].message.content)
print(f"({answer.usage.completion_tokens} tokens)")
