"""A trained network and real images that come with the package, so that every example runs offline.

>>> from lowbit.demo import load_images, load_network
>>> network = load_network()  # float32, eval mode
>>> x, y = load_images("test")
>>> x.shape, y.shape
(torch.Size([3000, 1, 28, 28]), torch.Size([3000]))
>>> bool((network(x[:500]).argmax(1) == y[:500]).float().mean() > 0.9)
True
"""

from lowbit.demo.data import load_images
from lowbit.demo.network import DemoResNet, load_network

__all__ = ["DemoResNet", "load_images", "load_network"]
