package exportd

import (
	"context"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"math"
	"os"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	exportdv1 "exportd.internal/go/exportd/v1"
)

// maxRestarts is how often a download begins anew because the bytes it began with are no
// longer what the server has.
const maxRestarts = 3

// maxCorrupt is how often bytes are fetched that come wrong each time.
const maxCorrupt = 3

// How a [File] was verified.
const (
	// VerifiedBySHA256 means that SHA-256 vouches for every byte.
	VerifiedBySHA256 = "sha256"
	// VerifiedByCRC32C means that the header of a part could not be told from the joined
	// file, so that the CRC32C of the whole had to do.
	VerifiedByCRC32C = "crc32c"
)

// File is a finished download.
type File struct {
	// Path is where it lies.
	Path string
	// Bytes is its size.
	Bytes int64
	// SHA256 is its SHA-256 in hex; empty for several parts joined, where each part was
	// verified by its own.
	SHA256 string
	// CRC32C is its CRC32C (Castagnoli).
	CRC32C uint32
	// VerifiedBy is VerifiedBySHA256 or VerifiedByCRC32C.
	VerifiedBy string
}

// DownloadOption changes what [Client.Download] does.
type DownloadOption func(*download)

// WithPart downloads one part instead of all of them joined.
func WithPart(index int32) DownloadOption { return func(d *download) { d.part = &index } }

// WithOverwrite lets the download take the place of a file that is there.
func WithOverwrite() DownloadOption { return func(d *download) { d.overwrite = true } }

// WithProgress has report called with the bytes that are there and the bytes in all, from
// the goroutine that downloads. The first may fall back when a download begins anew.
func WithProgress(report func(done, total int64)) DownloadOption {
	return func(d *download) { d.report = report }
}

// download is one call of Download.
type download struct {
	client    *Client
	jobID     string
	part      *int32
	overwrite bool
	report    func(done, total int64)
}

// Download writes the output of a job to path and verifies it. A path that is a directory
// gets the server's file name in it.
//
// A broken stream goes on at the last verified byte. The bytes lie in a temporary file
// beside path until all are verified and on the disk; path appears last. When Download
// fails the temporary file stays, and the same call goes on from there. It is removed when
// nothing can complete it: the job is gone or has no output any more, or the bytes are
// wrong.
//
// Errors are those of the server (see [Reason]), DATA_LOSS when the bytes do not match
// their checksums, [fs.ErrExist] when there is a file at path, and those of the disk.
func (c *Client) Download(ctx context.Context, jobID, path string, opts ...DownloadOption) (*File, error) {
	d := download{client: c, jobID: jobID, report: func(int64, int64) {}}
	for _, opt := range opts {
		opt(&d)
	}
	for restarts := 0; ; restarts++ {
		file, err := d.try(ctx, path)
		var stale *staleError
		if !errors.As(err, &stale) {
			return file, err
		}
		if restarts == maxRestarts {
			return nil, stale.cause
		}
	}
}

func (d *download) try(ctx context.Context, path string) (*File, error) {
	src, err := d.source(ctx)
	if err != nil {
		if isHopeless(err) {
			removeLeftovers(path, partialKey{d.jobID, math.MaxInt64, d.part})
		}
		return nil, err
	}
	final, err := target(path, src.fileName)
	if err != nil {
		return nil, err
	}
	if !d.overwrite {
		if err := refuseExisting(final); err != nil {
			return nil, err
		}
	}
	key := partialKey{d.jobID, src.generation, d.part}
	partial, err := openPartial(final, key)
	if err != nil {
		return nil, err
	}
	defer partial.close()
	removeLeftovers(final, key)
	result, err := d.fill(ctx, partial, src)
	if err == nil {
		err = partial.publish(final, d.overwrite)
	}
	if err != nil {
		if isHopeless(err) || partial.isEmpty() {
			partial.remove()
		}
		return nil, err
	}
	result.Path = final
	return result, nil
}

// source asks what there is to download.
func (d *download) source(ctx context.Context) (*source, error) {
	var response *exportdv1.GetJobResponse
	err := d.client.within(ctx, func(ctx context.Context) (err error) {
		response, err = d.client.GetJob(ctx, &exportdv1.GetJobRequest{JobId: d.jobID})
		return err
	})
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, err
	}
	if src := sourceOf(response.GetJob(), d.part); src != nil {
		return src, nil
	}
	return nil, d.refusal(ctx)
}

// refusal is what the server says to a download of which the manifest knows nothing: the
// job is not finished, failed, expired, has no such part, or its parts do not join.
func (d *download) refusal(ctx context.Context) error {
	request := &exportdv1.StreamDownloadRequest{JobId: d.jobID, PartIndex: d.part}
	var tries attempts
	for {
		err := each(ctx, d.client.streams.StreamDownload, request, d.client.stall,
			func(*exportdv1.StreamDownloadResponse) (bool, error) { return true, nil })
		switch {
		case err == nil: // it has finished since
			return &staleError{status.Error(codes.Aborted, "the job keeps changing; try again")}
		case ctx.Err() != nil:
			return ctx.Err()
		case !isPassing(err):
			return err
		}
		if err := tries.pause(ctx, err); err != nil {
			return err
		}
	}
}

// fill completes the partial file and verifies it.
func (d *download) fill(ctx context.Context, partial *partialFile, src *source) (*File, error) {
	verifier := newVerifier(partial.file, src)
	there, err := verifier.readBack(ctx)
	if err != nil {
		return nil, err
	}
	verifier.start()
	defer verifier.stop()
	f := fetch{download: d, src: src, file: partial.file, verifier: verifier, done: there}
	if err := f.run(ctx); err != nil {
		return nil, err
	}
	verifiedBy, err := verifier.finish()
	if err != nil {
		if there > 0 { // what was here from before may be what is wrong
			return nil, &staleError{err}
		}
		return nil, err
	}
	return &File{
		Bytes:      src.bytes,
		SHA256:     hex.EncodeToString(src.sha256),
		CRC32C:     src.crc32c,
		VerifiedBy: verifiedBy,
	}, nil
}

// fetch brings the bytes of src from done on into file.
type fetch struct {
	*download
	src      *source
	file     *os.File
	verifier *verifier
	done     int64
}

func (f *fetch) run(ctx context.Context) error {
	var tries attempts
	corruptAt, corrupt := int64(-1), 0
	f.report(f.done, f.src.bytes)
	for f.done < f.src.bytes {
		before := f.done
		err := each(ctx, f.client.streams.StreamDownload, &exportdv1.StreamDownloadRequest{
			JobId:             f.jobID,
			PartIndex:         f.src.part,
			ReadOffset:        f.done,
			IfGenerationMatch: f.src.generation,
		}, f.client.stall, f.take)
		if bad := (*corruptError)(nil); errors.As(err, &bad) {
			if bad.offset != corruptAt {
				corruptAt, corrupt = bad.offset, 0
			}
			if corrupt++; corrupt == maxCorrupt {
				return err
			}
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case Reason(err) == "GENERATION_MISMATCH":
			return &staleError{err}
		case !isPassing(err):
			return err
		case f.done == f.src.bytes:
			return nil
		case f.done > before:
			tries.progress()
		}
		if err := tries.pause(ctx, err); err != nil {
			return err
		}
	}
	return nil
}

// take checks a message and writes its data. It is never done: the server shall see that
// its stream was read to the end.
func (f *fetch) take(m *exportdv1.StreamDownloadResponse) (done bool, err error) {
	if meta := m.GetMetadata(); meta != nil {
		if meta.GetGeneration() != f.src.generation || meta.GetTotalBytes() != f.src.bytes {
			return false, &staleError{status.Error(codes.Aborted, "the output is not the one that the download began with; try again")}
		}
	}
	data := m.GetData()
	switch {
	case len(data) == 0:
		return false, nil
	case m.GetOffset() != f.done:
		return false, &corruptError{f.done, "bytes of another offset came"}
	case f.done+int64(len(data)) > f.src.bytes:
		return false, &corruptError{f.done, "more bytes came than the file has"}
	case crc32.Checksum(data, castagnoli) != m.GetCrc32C():
		return false, &corruptError{f.done, "bytes came that do not match their checksum"}
	}
	if _, err := f.file.WriteAt(data, f.done); err != nil {
		return false, err
	}
	f.verifier.add(data, m.GetCrc32C())
	f.done += int64(len(data))
	f.report(f.done, f.src.bytes)
	return false, nil
}
