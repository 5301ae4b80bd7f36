"""From a name to a network: a module with its target layer, class weights and preprocessing."""

from scacam.networks.loading import load_network
from scacam.networks.network import Network

__all__ = ["Network", "load_network"]
