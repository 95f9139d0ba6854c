"""The Mesh on real sockets.  This package is the sole importer of libp2p.

internals   every private attribute of py-libp2p that we touch, and the host made of them
stream      frames on one libp2p stream, with tasks of their own
mesh        the Mesh itself
"""

from pinaivu_node.mesh.libp2p.mesh import open_libp2p_mesh

__all__ = ["open_libp2p_mesh"]
