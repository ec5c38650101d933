"""Deploy a second model with the SDK, ask it, scale it, and take it away again."""

from cloudlm import Client
from cloudlm.core.deployment import DeploymentSpec

with Client() as cloud:
    spec = DeploymentSpec(name="second-helper", model="models:/bank-helper@champion")
    cloud.deployments.apply(spec)
    view = cloud.deployments.wait_ready("second-helper", timeout_s=120)
    if view.status:
        print(f"{view.name} is {view.status.phase}, {view.status.ready_replicas} replica")
    with cloud.openai() as inference:
        answer = inference.chat.completions.create(
            model="second-helper",
            messages=[{"role": "user", "content": "I want to close my account"}],
        )
        print(answer.choices[0].message.content)
    cloud.deployments.delete("second-helper")
    cloud.deployments.wait_gone("second-helper", timeout_s=60)
    print("deleted")
