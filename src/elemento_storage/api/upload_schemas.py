"""What uploads are told, in Upload-Metadata, a query or a form, and what they answer."""

from msgspec import Struct, field

from elemento_storage.api.decode import Uid
from elemento_storage.api.image_schemas import Checksum
from elemento_storage.api.iso_schemas import IsoRequest
from elemento_storage.api.schemas import Request, SizeGB
from elemento_storage.images.incoming import Compression


class IsoUploadRequest(IsoRequest, kw_only=True):
    """``iso/create/upload``: a volume of the library, with its content."""

    size: SizeGB | None = None
    compression: Compression | None = None
    checksum: Checksum | None = None


class FillRequest(Request, kw_only=True):
    """The content of an ISO volume that waits for it."""

    volume_id: Uid
    creator_id: Uid | None = field(name="creatorID", default=None)
    compression: Compression | None = None
    checksum: Checksum | None = None


class UploadProblem(Struct, kw_only=True):
    """Why no volume could be made of an upload."""

    error: str
    code: str


class UploadAnswer(Struct, kw_only=True):
    """An upload. ``state`` is receiving, finishing, done or failed; ``offset`` and ``length`` are bytes."""

    upload_id: str
    state: str
    offset: int
    length: int | None
    created: str
    expires: str
    creator_id: str | None = field(name="creatorID")
    job: str | None
    vid: str | None
    error: UploadProblem | None
