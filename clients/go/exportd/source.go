package exportd

import (
	"fmt"

	exportdv1 "exportd.internal/go/exportd/v1"
)

// source is what the manifest says about the bytes of one file.
type source struct {
	generation int64
	part       *int32 // nil: all parts, joined
	fileName   string
	bytes      int64
	crc32c     uint32
	sha256     []byte // empty when several parts are joined
	pieces     []piece
}

// piece is a stretch of the file that is hashed by itself: bytes of the file, with so many
// of its first bytes (head) before and of its last bytes (tail) after them.
type piece struct {
	name   string
	bytes  int64
	sha256 []byte // empty: there is none to compare with
	head   int64
	tail   int64
}

// sourceOf finds the bytes to download; nil when the manifest has none.
func sourceOf(job *exportdv1.Job, part *int32) *source {
	manifest := job.GetManifest()
	src := &source{generation: job.GetGeneration(), part: part}
	if part == nil {
		if !manifest.GetJoinable() {
			return nil
		}
		src.fileName, src.bytes = manifest.GetFileName(), manifest.GetBytes()
		src.crc32c, src.sha256 = manifest.GetCrc32C(), manifest.GetSha256()
		src.pieces = piecesOf(manifest)
		return src
	}
	for _, p := range manifest.GetParts() {
		if p.GetIndex() == *part {
			src.fileName, src.bytes = p.GetFileName(), p.GetBytes()
			src.crc32c, src.sha256 = p.GetCrc32C(), p.GetSha256()
			src.pieces = []piece{{name: "the file", bytes: p.GetBytes(), sha256: p.GetSha256()}}
			return src
		}
	}
	return nil
}

// piecesOf cuts a joined file into its parts. The joined file has the prefix of its first
// part and the suffix of its last one only, so that those of the others are taken from
// there, where they have the same length.
func piecesOf(manifest *exportdv1.Manifest) []piece {
	parts := manifest.GetParts()
	if len(manifest.GetSha256()) > 0 || len(parts) < 2 {
		return []piece{{name: "the file", bytes: manifest.GetBytes(), sha256: manifest.GetSha256()}}
	}
	prefix, suffix := parts[0].GetPrefixBytes(), parts[len(parts)-1].GetSuffixBytes()
	whole := []piece{{name: "the file", bytes: manifest.GetBytes()}}
	pieces := make([]piece, len(parts))
	var total int64
	for i, part := range parts {
		p := piece{name: fmt.Sprintf("part %d", part.GetIndex())}
		if i > 0 {
			p.head = part.GetPrefixBytes()
		}
		if i < len(parts)-1 {
			p.tail = part.GetSuffixBytes()
		}
		p.bytes = part.GetBytes() - p.head - p.tail
		if (p.head == 0 || p.head == prefix) && (p.tail == 0 || p.tail == suffix) {
			p.sha256 = part.GetSha256()
		} else { // other lengths mean other bytes
			p.head, p.tail = 0, 0
		}
		if p.bytes < 0 {
			return whole
		}
		pieces[i] = p
		total += p.bytes
	}
	if total != manifest.GetBytes() {
		return whole
	}
	return pieces
}
