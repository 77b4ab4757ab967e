"""Jobs are cancelled at once, so no flag asks for it

Revision: 0015_no_cancel_flag; follows 0014_appeals
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015_no_cancel_flag"
down_revision = "0014_appeals"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # In place: a batch would make the table anew, and take what refers to its rows with the old.
    op.drop_column("jobs", "cancel_requested")


def downgrade() -> None:
    flag: sa.Column[bool] = sa.Column(
        "cancel_requested", sa.Boolean(), nullable=False, server_default=sa.false()
    )
    op.add_column("jobs", flag)
