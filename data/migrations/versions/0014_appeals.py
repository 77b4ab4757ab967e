"""Appeals to a warning or suspension

Revision: 0014_appeals; follows 0013_rounds
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014_appeals"
down_revision = "0013_rounds"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("safety_cases") as table:
        table.add_column(sa.Column("appeal", sa.JSON(), nullable=True))


def downgrade() -> None:
    with op.batch_alter_table("safety_cases") as table:
        table.drop_column("appeal")
