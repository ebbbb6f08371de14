package exportd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
)

const (
	readBackBytes = 1 << 20
	// queueLength bounds the messages, each of 2 MiB at most, that wait to be hashed.
	queueLength = 4
)

// verifier hashes a file's bytes in their order, beside whoever fetches them, and holds
// them against the checksums of the manifest.
//
// A part of a joined file is rebuilt with the prefix and suffix that the joined file
// carries once. That can fail without any damage, when those of two parts have the same
// length and differ; the CRC32C of the whole decides then.
type verifier struct {
	file    *os.File
	src     *source
	digests []hash.Hash // one for each piece that was begun
	end     int64       // where the last of those ends
	seen    int64
	crc     uint32
	err     error
	queue   chan message
	stopped chan struct{}
}

// message is bytes of the file, and their CRC32C.
type message struct {
	data []byte
	crc  uint32
}

func newVerifier(file *os.File, src *source) *verifier {
	return &verifier{file: file, src: src}
}

// readBack hashes what the file holds from an earlier download, and says how much it is.
func (v *verifier) readBack(ctx context.Context) (int64, error) {
	info, err := v.file.Stat()
	if err != nil {
		return 0, err
	}
	size := info.Size()
	if size > v.src.bytes { // nothing that this client wrote
		return 0, v.file.Truncate(0)
	}
	block := make([]byte, min(size, readBackBytes))
	for v.seen < size && v.err == nil {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		part := block[:min(size-v.seen, readBackBytes)]
		if _, err := v.file.ReadAt(part, v.seen); err != nil {
			return 0, err
		}
		v.hash(message{part, crc32.Checksum(part, castagnoli)})
	}
	return size, v.err
}

// start has what is added hashed by a goroutine, until stop.
func (v *verifier) start() {
	v.queue, v.stopped = make(chan message, queueLength), make(chan struct{})
	go func() {
		defer close(v.stopped)
		for m := range v.queue {
			v.hash(m)
		}
	}()
}

// add takes the next bytes and their CRC32C. They are in the file already and must not
// change any more.
func (v *verifier) add(data []byte, crc uint32) { v.queue <- message{data, crc} }

// stop waits until all that was added is hashed.
func (v *verifier) stop() {
	if v.queue != nil {
		close(v.queue)
		<-v.stopped
		v.queue = nil
	}
}

// finish compares, once all bytes were added, and says what vouches for them.
func (v *verifier) finish() (verifiedBy string, err error) {
	v.stop()
	for v.err == nil && len(v.digests) < len(v.src.pieces) {
		v.begin() // the last pieces may be empty
	}
	if v.err != nil {
		return "", v.err
	}
	if v.seen != v.src.bytes {
		return "", lost("the file has %d bytes and should have %d", v.seen, v.src.bytes)
	}
	if v.crc != v.src.crc32c {
		return "", lost("the file does not match its CRC32C")
	}
	verifiedBy = VerifiedBySHA256
	for i, p := range v.src.pieces {
		if err := v.copy(v.digests[i], v.src.bytes-p.tail, p.tail); err != nil {
			return "", err
		}
		if len(p.sha256) > 0 && bytes.Equal(v.digests[i].Sum(nil), p.sha256) {
			continue
		}
		if len(p.sha256) > 0 && p.head == 0 && p.tail == 0 {
			return "", lost("%s does not match its SHA-256", p.name)
		}
		verifiedBy = VerifiedByCRC32C
	}
	return verifiedBy, nil
}

// hash takes the next bytes; what goes wrong is for finish to tell.
func (v *verifier) hash(m message) {
	data := m.data
	v.crc = joinCRC(v.crc, m.crc, int64(len(data)))
	for len(data) > 0 && v.err == nil {
		if v.seen == v.end {
			v.begin()
			continue
		}
		n := min(int64(len(data)), v.end-v.seen)
		v.digests[len(v.digests)-1].Write(data[:n])
		v.seen += n
		data = data[n:]
	}
}

// begin goes on to the next piece.
func (v *verifier) begin() {
	if len(v.digests) == len(v.src.pieces) {
		v.err = lost("the file has more than the %d bytes of its parts", v.end)
		return
	}
	p := v.src.pieces[len(v.digests)]
	digest := sha256.New()
	v.err = v.copy(digest, 0, p.head)
	v.digests = append(v.digests, digest)
	v.end += p.bytes
}

func (v *verifier) copy(to io.Writer, offset, length int64) error {
	n, err := io.Copy(to, io.NewSectionReader(v.file, offset, length))
	if err == nil && n != length {
		err = errors.Join(io.ErrUnexpectedEOF, fmt.Errorf("%s was changed by somebody else", v.file.Name()))
	}
	return err
}

func lost(format string, arguments ...any) error {
	return &spoiledError{fmt.Sprintf(format, arguments...)}
}
