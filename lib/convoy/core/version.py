"""The version of Convoy, here and nowhere else: a driver that was sent to a cluster runs beside no distribution."""

VERSION = "0.1.0"
