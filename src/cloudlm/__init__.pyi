from cloudlm.client.asynchronous import AsyncClient as AsyncClient
from cloudlm.client.sync import Client as Client
from cloudlm.core.deployment import DeploymentSpec as DeploymentSpec
from cloudlm.core.errors import CloudlmError as CloudlmError

__version__: str
