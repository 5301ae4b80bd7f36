"""From a name to a network: a module with its target layer, class weights and preprocessing."""

from scacam.networks.loading import Network, load_network

__all__ = ["Network", "load_network"]
