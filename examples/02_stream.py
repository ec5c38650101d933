"""Read an answer as it is written, with a client that the SDK hands out ready-made."""

from cloudlm import Client

with Client() as cloud, cloud.openai() as inference:
    stream = inference.chat.completions.create(
        model="bank-helper",
        messages=[{"role": "user", "content": "How do I change my PIN?"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            print(f"\n({chunk.usage.completion_tokens} tokens)")
