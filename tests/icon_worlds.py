"""An icon world without artwork, for the tests of the training recipes."""

from overpaint.train import icon_world


def build(*, hold_out: bool = True) -> icon_world.World:
    """Return a world in which every icon is a dot."""
    dot = {"body": '<circle cx="8" cy="8" r="7" fill="#123456"/>'}
    names = [
        *icon_world.OBJECTS.values(),
        *icon_world.ACTIONS.values(),
        *icon_world.FLAGS.values(),
        *icon_world.LOGOS,
    ]
    icon_set = {"icons": dict.fromkeys(names, dot), "width": 16, "height": 16}
    sets = {name: icon_set for name in icon_world.PACKAGES}
    return icon_world.World(sets, hold_out=hold_out)
