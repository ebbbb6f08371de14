package exportd

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	exportdv1 "exportd.internal/go/exportd/v1"
)

var rows = strings.Repeat("0x5e,USDC,12.5\n", 400)

func TestPartsJoinedAreVerifiedByTheirSHA256(t *testing.T) {
	// Header and trailer are carried once, so that each part has to be rebuilt.
	f := newFake(7, 4, "header\n"+rows+"end\n", "header\n"+rows+rows+"end\n", "header\nend\n", "header\nlast\nend\n")
	file := fetched(t, f)
	if file.VerifiedBy != VerifiedBySHA256 || file.SHA256 != "" || file.Bytes != int64(len(f.content)) {
		t.Errorf("got %+v", file)
	}
}

func TestHeadersOfOneLengthThatDifferLeaveItToTheCRC(t *testing.T) {
	if file := fetched(t, newFake(7, 0, "header\n"+rows, "HEADER\n"+rows)); file.VerifiedBy != VerifiedByCRC32C {
		t.Errorf("verified by %s", file.VerifiedBy)
	}
}

func TestHeadersOfOtherLengthsLeaveItToTheCRC(t *testing.T) {
	f := newFake(7, 0, "header\n"+rows, "header\n"+rows)
	f.job.Manifest.Parts[1].PrefixBytes, f.job.Manifest.Parts[1].Bytes = 8, f.job.Manifest.Parts[1].Bytes+1
	if file := fetched(t, f); file.VerifiedBy != VerifiedByCRC32C {
		t.Errorf("verified by %s", file.VerifiedBy)
	}
}

func TestADownloadGoesOnWhereItsStreamBroke(t *testing.T) {
	for _, cut := range []error{
		status.Error(codes.Unavailable, "gone"), status.Error(codes.Internal, "RST_STREAM"),
		refused(codes.ResourceExhausted, "READER_STALLED"), refused(codes.Unavailable, "DRAINING"), nil,
	} {
		f := newFake(0, 0, rows)
		f.faults = append(f.faults, f.cutAfter(1500, cut), f.cutAfter(4000, cut))
		file := fetched(t, f)
		if want := []int64{0, 1500, 4000}; !slices.Equal(f.offsets(), want) {
			t.Errorf("after %v the streams began at %v, not %v", cut, f.offsets(), want)
		}
		if f.requests[2].GetIfGenerationMatch() != 1 {
			t.Error("the generation was not held")
		}
		if file.VerifiedBy != VerifiedBySHA256 || len(file.SHA256) != 64 {
			t.Errorf("got %+v", file)
		}
	}
}

func TestAMessageThatIsWrongIsReadAgain(t *testing.T) {
	for name, message := range map[string]*exportdv1.StreamDownloadResponse{
		"checksum": {Offset: 2000, Data: []byte("x"), Crc32C: 1},
		"gap":      {Offset: 2001},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(0, 0, rows)
			f.faults = append(f.faults, func(request *exportdv1.StreamDownloadRequest, to stream) error {
				if err := f.send(request, to, 2000); err != nil {
					return err
				}
				if len(message.Data) == 0 {
					return f.send(&exportdv1.StreamDownloadRequest{ReadOffset: message.Offset}, to, int64(len(f.content)))
				}
				return to.Send(message)
			})
			fetched(t, f)
			if want := []int64{0, 2000}; !slices.Equal(f.offsets(), want) {
				t.Errorf("the streams began at %v, not %v", f.offsets(), want)
			}
		})
	}
}

func TestASilentStreamIsReplaced(t *testing.T) {
	f := newFake(0, 0, rows)
	silent := func(_ *exportdv1.StreamDownloadRequest, to stream) error {
		<-to.Context().Done()
		return to.Context().Err()
	}
	f.faults = append(f.faults, silent, f.hangAfter(3000))
	client := f.serve(t)
	client.stall = 200 * time.Millisecond
	must(t, client, f)
	if want := []int64{0, 0, 3000}; !slices.Equal(f.offsets(), want) {
		t.Errorf("the streams began at %v, not %v", f.offsets(), want)
	}
}

func TestAnOutputThatWasMadeAnewIsDownloadedAnew(t *testing.T) {
	f, fresh := newFake(0, 0, rows), newFake(0, 0, strings.ToUpper(rows))
	f.faults = append(f.faults, func(request *exportdv1.StreamDownloadRequest, to stream) error {
		if err := f.send(request, to, 3000); err != nil {
			return err
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		f.job, f.content = fresh.job, fresh.content
		f.job.Generation = 2
		return status.Error(codes.Unavailable, "gone")
	})
	fetched(t, f)
}

func TestTheNextCallGoesOnWhereACancelledOneWas(t *testing.T) {
	f := newFake(0, 0, rows)
	f.faults = append(f.faults, f.hangAfter(2*chunk))
	client, path := f.serve(t), filepath.Join(t.TempDir(), "positions.csv")
	ctx, cancel := context.WithCancel(context.Background())
	_, err := client.Download(ctx, jobID, path, WithProgress(func(done, _ int64) {
		if done == 2*chunk {
			cancel()
		}
	}))
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal("a file that is not complete has the final name")
	}
	if _, err := client.Download(context.Background(), jobID, path); err != nil {
		t.Fatal(err)
	}
	if want := []int64{0, 2 * chunk}; !slices.Equal(f.offsets(), want) {
		t.Errorf("the streams began at %v, not %v", f.offsets(), want)
	}
	holds(t, path, f.content)
}

func TestLeftoversThatWereSpoiledAreThrownAway(t *testing.T) {
	f := newFake(0, 0, rows)
	client, path := f.serve(t), filepath.Join(t.TempDir(), "positions.csv")
	leftover := filepath.Join(filepath.Dir(path), ".positions.csv."+jobID+"-1.part")
	for _, size := range []int{3000, len(f.content), len(f.content) + 1} {
		if err := os.WriteFile(leftover, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Download(context.Background(), jobID, path, WithOverwrite()); err != nil {
			t.Fatal(err)
		}
		holds(t, path, f.content)
	}
}

func TestWhatDoesNotMatchItsChecksumIsNotPublished(t *testing.T) {
	f := newFake(0, 0, rows)
	f.job.Manifest.Sha256 = make([]byte, 32)
	if _, err := f.serve(t).Download(context.Background(), jobID, emptyAfter(t)); status.Code(err) != codes.DataLoss {
		t.Error(err)
	}
}

func TestTheCRCOfTheWholeDecidesWhereSHA256Cannot(t *testing.T) {
	f := newFake(7, 0, "header\n"+rows, "HEADER\n"+rows)
	f.job.Manifest.Crc32C++
	if _, err := f.serve(t).Download(context.Background(), jobID, emptyAfter(t)); status.Code(err) != codes.DataLoss {
		t.Error(err)
	}
}

func TestBytesThatNothingCanCompleteAreRemoved(t *testing.T) {
	for reason, code := range map[string]codes.Code{
		"JOB_NOT_FOUND": codes.NotFound, "PART_NOT_FOUND": codes.NotFound,
		"OUTPUT_EXPIRED": codes.NotFound, "OUTPUT_DROPPED": codes.NotFound,
		"JOB_FAILED": codes.FailedPrecondition, "JOB_CANCELLED": codes.FailedPrecondition,
		"PARTS_NOT_JOINABLE": codes.FailedPrecondition,
	} {
		f := newFake(0, 0, rows)
		f.faults = append(f.faults, f.cutAfter(2000, refused(code, reason)))
		if _, err := f.serve(t).Download(context.Background(), jobID, emptyAfter(t)); Reason(err) != reason {
			t.Error(err)
		}
	}
}

func TestAfterAnyOtherErrorTheSameCallGoesOn(t *testing.T) {
	for reason, code := range map[string]codes.Code{
		"UNAUTHENTICATED": codes.Unauthenticated, "PERMISSION_DENIED": codes.PermissionDenied,
		"QUOTA_EXCEEDED": codes.ResourceExhausted, "INTERNAL": codes.Internal, "CHECKSUM_MISMATCH": codes.DataLoss,
	} {
		f := newFake(0, 0, rows)
		f.faults = append(f.faults, f.cutAfter(2000, refused(code, reason)))
		client, path := f.serve(t), filepath.Join(t.TempDir(), "positions.csv")
		if _, err := client.Download(context.Background(), jobID, path); Reason(err) != reason {
			t.Error(err)
		}
		if _, err := client.Download(context.Background(), jobID, path); err != nil {
			t.Error(err)
		}
		if want := []int64{0, 2000}; !slices.Equal(f.offsets(), want) {
			t.Errorf("after %s the streams began at %v, not %v", reason, f.offsets(), want)
		}
		holds(t, path, f.content)
	}
}

func TestAnErrorBeforeTheFirstByteLeavesNothing(t *testing.T) {
	f := newFake(0, 0, rows)
	f.faults = append(f.faults, f.cutAfter(0, refused(codes.Unauthenticated, "UNAUTHENTICATED")))
	if _, err := f.serve(t).Download(context.Background(), jobID, emptyAfter(t)); Reason(err) != "UNAUTHENTICATED" {
		t.Error(err)
	}
}

func TestTheLeftoversOfAJobThatIsGoneAreRemoved(t *testing.T) {
	f := newFake(0, 0, rows)
	f.getJob = func(context.Context) error { return refused(codes.NotFound, "JOB_NOT_FOUND") }
	path := emptyAfter(t)
	write(t, filepath.Join(filepath.Dir(path), ".positions.csv."+jobID+"-4.part"), "older")
	if _, err := f.serve(t).Download(context.Background(), jobID, path); Reason(err) != "JOB_NOT_FOUND" {
		t.Error(err)
	}
}

func TestLeftoversOfOlderGenerationsAreRemovedAndNoOthers(t *testing.T) {
	f := newFake(0, 0, rows)
	f.job.Generation = 12
	client, directory := f.serve(t), t.TempDir()
	for name, stays := range map[string]bool{
		".positions.csv." + jobID + "-11.part":     false,
		".positions.csv." + jobID + "-2.part":      false,
		".positions.csv." + jobID + "-13.part":     true,
		".positions.csv." + jobID + "-11-0.part":   true, // a part of it
		".positions.csv." + jobID + "-11.part.bak": true,
		".other.csv." + jobID + "-11.part":         true,
		".positions.csv.another-job-11.part":       true,
	} {
		path := filepath.Join(directory, name)
		write(t, path, "older")
		if _, err := client.Download(context.Background(), jobID, filepath.Join(directory, "positions.csv"), WithOverwrite()); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(path); (err == nil) != stays {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestALongNameResumesAndHasItsOlderGenerationsRemoved(t *testing.T) {
	f := newFake(0, 0, rows)
	client, directory := f.serve(t), t.TempDir()
	path := filepath.Join(directory, strings.Repeat("é", 118)+".csv")
	for _, generation := range []int64{9, 10, 1 << 62} {
		f.mu.Lock()
		f.job.Generation = generation
		f.faults = append(f.faults, f.cutAfter(2000, refused(codes.Unauthenticated, "UNAUTHENTICATED")))
		f.mu.Unlock()
		if _, err := client.Download(context.Background(), jobID, path); Reason(err) != "UNAUTHENTICATED" {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(directory)
		if err != nil || len(entries) != 1 || len(entries[0].Name()) >= 255 {
			t.Errorf("left over: %v (%v)", entries, err)
		}
	}
	if _, err := client.Download(context.Background(), jobID, path); err != nil {
		t.Fatal(err)
	}
	if offsets := f.offsets(); offsets[len(offsets)-1] != 2000 {
		t.Errorf("the streams began at %v", offsets)
	}
	holds(t, path, f.content)
}

func TestADownloadWaitsWhenAQuotaIsUsedUp(t *testing.T) {
	f := newFake(0, 0, rows)
	f.faults = append(f.faults, f.cutAfter(2000, later(codes.ResourceExhausted, "QUOTA_EXCEEDED", time.Millisecond)))
	fetched(t, f)
	if want := []int64{0, 2000}; !slices.Equal(f.offsets(), want) {
		t.Errorf("the streams began at %v, not %v", f.offsets(), want)
	}
}

func TestBytesThatStayCorruptAreLostAfterThreeTries(t *testing.T) {
	f := newFake(0, 0, rows)
	for range 2 * maxCorrupt {
		f.faults = append(f.faults, func(request *exportdv1.StreamDownloadRequest, to stream) error {
			if err := f.send(request, to, 2000); err != nil {
				return err
			}
			return to.Send(&exportdv1.StreamDownloadResponse{Offset: 2000, Data: []byte("x"), Crc32C: 1})
		})
	}
	_, err := f.serve(t).Download(context.Background(), jobID, filepath.Join(t.TempDir(), "positions.csv"))
	if want := []int64{0, 2000, 2000}; status.Code(err) != codes.DataLoss || !slices.Equal(f.offsets(), want) {
		t.Errorf("%v; the streams began at %v, not %v", err, f.offsets(), want)
	}
}

func TestWhatTheManifestLacksIsRefusedByTheServer(t *testing.T) {
	f := newFake(0, 0, rows, rows)
	f.job.Manifest.Joinable = false
	f.faults = append(f.faults, func(*exportdv1.StreamDownloadRequest, stream) error {
		return refused(codes.FailedPrecondition, "PARTS_NOT_JOINABLE")
	})
	client := f.serve(t)
	if _, err := client.Download(context.Background(), jobID, emptyAfter(t)); Reason(err) != "PARTS_NOT_JOINABLE" {
		t.Error(err)
	}
}

func TestAFileThatIsThereIsReplacedOnlyWhenAllowed(t *testing.T) {
	f := newFake(0, 0, rows)
	client, path := f.serve(t), filepath.Join(t.TempDir(), "positions.csv")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Download(context.Background(), jobID, path); !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	holds(t, path, []byte("mine"))
	if len(f.offsets()) > 0 {
		t.Error("it was downloaded for nothing")
	}
	if _, err := client.Download(context.Background(), jobID, path, WithOverwrite()); err != nil {
		t.Error(err)
	}
	holds(t, path, f.content)
}

func TestAFileThatAppearsMeanwhileIsNotReplaced(t *testing.T) {
	f := newFake(0, 0, rows)
	path := filepath.Join(t.TempDir(), "positions.csv")
	_, err := f.serve(t).Download(context.Background(), jobID, path, WithProgress(func(done, _ int64) {
		if done == chunk {
			if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
				t.Error(err)
			}
		}
	}))
	if !errors.Is(err, fs.ErrExist) {
		t.Error(err)
	}
	holds(t, path, []byte("mine"))
}

func TestOneOfTwoDownloadsToAPathIsRefused(t *testing.T) {
	f := newFake(0, 0, rows)
	client, path := f.serve(t), filepath.Join(t.TempDir(), "positions.csv")
	var second error
	_, err := client.Download(context.Background(), jobID, path, WithProgress(func(done, _ int64) {
		if done == 0 {
			_, second = client.Download(context.Background(), jobID, path)
		}
	}))
	if err != nil || second == nil || !strings.Contains(second.Error(), "another download") {
		t.Errorf("the first: %v; the second: %v", err, second)
	}
}

func TestADirectoryGetsAFileNamedByTheServer(t *testing.T) {
	f := newFake(0, 0, rows)
	f.job.Manifest.FileName = "../../etc/passwd"
	client, directory := f.serve(t), t.TempDir()
	for path, want := range map[string]string{
		directory: "passwd",
		filepath.Join(directory, "missing/there") + "/": "missing/there/passwd",
	} {
		file, err := client.Download(context.Background(), jobID, path)
		if err != nil || file.Path != filepath.Join(directory, want) {
			t.Errorf("%+v, %v", file, err)
		}
	}
}

// fetched downloads what f serves and compares it.
func fetched(t *testing.T, f *fake) *File {
	t.Helper()
	return must(t, f.serve(t), f)
}

func must(t *testing.T, client *Client, f *fake) *File {
	t.Helper()
	directory := t.TempDir()
	file, err := client.Download(context.Background(), jobID, filepath.Join(directory, "positions.csv"))
	if err != nil {
		t.Fatal(err)
	}
	holds(t, file.Path, f.content)
	entries, err := os.ReadDir(directory)
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the file there are %v (%v)", entries, err)
	}
	return file
}

// emptyAfter is a path in a directory that must be empty when the test ends.
func emptyAfter(t *testing.T) string {
	t.Helper()
	directory := t.TempDir()
	t.Cleanup(func() {
		if entries, err := os.ReadDir(directory); err != nil || len(entries) > 0 {
			t.Errorf("left over: %v (%v)", entries, err)
		}
	})
	return filepath.Join(directory, "positions.csv")
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func holds(t *testing.T, path string, want []byte) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || !slices.Equal(got, want) {
		t.Errorf("%s has %d bytes (%v), not the %d that were sent", path, len(got), err, len(want))
	}
}
