package exportd

import (
	"context"
	"errors"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	exportdv1 "exportd.internal/go/exportd/v1"
)

func TestATokenGoesUnencryptedOnlyToLoopbackOrWhenAllowed(t *testing.T) {
	for _, c := range []struct {
		address string
		options []Option
		refused bool
	}{
		{"exports.example.com:443", nil, false},
		{"exports.example.com:443", []Option{WithPlaintext()}, true},
		{"exports.example.com:443", []Option{WithPlaintext(), WithPlaintextToken()}, false},
		{"localhost.example.com:443", []Option{WithPlaintext()}, true},
		{"127.0.0.1.example.com:443", []Option{WithPlaintext()}, true},
		{"10.0.0.1:443", []Option{WithPlaintext()}, true},
		{"localhost:443", []Option{WithPlaintext()}, false},
		{"dns:///localhost:443", []Option{WithPlaintext()}, false},
		{"127.0.0.2:443", []Option{WithPlaintext()}, false},
		{"[::1]:443", []Option{WithPlaintext()}, false},
		{"unix:/run/exportd.sock", []Option{WithPlaintext()}, false},
	} {
		client, err := NewClient(c.address, append(c.options, WithToken("key"))...)
		if (err != nil) != c.refused {
			t.Errorf("%s, %d options: %v", c.address, len(c.options), err)
		}
		if err == nil {
			_ = client.Close()
		}
	}
}

func TestTwoTransportsAreRefused(t *testing.T) {
	if _, err := NewClient("localhost:1", WithPlaintext(), WithPlaintext()); err == nil {
		t.Error("one of them was dropped without a word")
	}
}

func TestNamesOfTheServerStayInTheirDirectory(t *testing.T) {
	for name, want := range map[string]string{
		"positions.csv":                   "positions.csv",
		"../../etc/passwd":                "passwd",
		`..\..\windows\win.ini`:           "win.ini",
		"/absolute":                       "absolute",
		"..":                              "export",
		"":                                "export",
		".bashrc":                         "bashrc",
		"a\x00b\nc\u202egnp":              "abcgnp",
		"a\xffb":                          "ab",
		strings.Repeat("ä", 200) + ".csv": strings.Repeat("ä", 88) + ".csv",
	} {
		if got := safeName(name, "export"); got != want {
			t.Errorf("%q became %q, not %q", name, got, want)
		}
	}
}

func TestTheCRCOfAWholeIsJoinedFromThoseOfItsPieces(t *testing.T) {
	data := []byte(strings.Repeat("0x5e,USDC,12.5\n", 100_000))
	want := crc32.Checksum(data, castagnoli)
	for _, cut := range []int{0, 1, 7, 1 << 20, len(data) - 1, len(data)} {
		first, second := crc32.Checksum(data[:cut], castagnoli), crc32.Checksum(data[cut:], castagnoli)
		if got := joinCRC(first, second, int64(len(data)-cut)); got != want {
			t.Errorf("cut at %d: %08x, not %08x", cut, got, want)
		}
	}
}

func TestTenAttemptsWithoutProgressAreEnough(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := errors.New("gone")
		var tries attempts
		for range 5 {
			if err := tries.pause(t.Context(), gone); err != nil {
				t.Fatal(err)
			}
		}
		tries.progress()
		started, calls := time.Now(), 1
		for tries.pause(t.Context(), gone) == nil {
			calls++
		}
		if took := time.Since(started); calls != 10 || took < 10*time.Second || took > 22*time.Second {
			t.Errorf("gave up after %d attempts and %s", calls, took)
		}
	})
}

func TestAPauseEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var tries attempts
	if err := tries.pause(ctx, errors.New("gone")); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestAReasonIsExportdsOwn(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{refused(codes.NotFound, "JOB_NOT_FOUND"), "JOB_NOT_FOUND"},
		{refusedBy("gateway.example.com", codes.NotFound, "NO_ROUTE"), ""},
		{status.Error(codes.NotFound, "no such page"), ""},
		{errors.New("disk full"), ""},
		{nil, ""},
	} {
		if got := Reason(c.err); got != c.want {
			t.Errorf("%v: %q", c.err, got)
		}
	}
}

type watching = grpc.ServerStreamingServer[exportdv1.WatchJobResponse]

func TestAWatchGoesOnAfterItsStreamBroke(t *testing.T) {
	say := func(state exportdv1.JobState, err error) func(watching) error {
		return func(to watching) error {
			if sent := to.Send(&exportdv1.WatchJobResponse{Job: &exportdv1.Job{State: state}}); sent != nil {
				return sent
			}
			return err
		}
	}
	f := newFake(0, 0, rows)
	f.watches = []func(watching) error{
		say(exportdv1.JobState_JOB_STATE_PENDING, status.Error(codes.Unavailable, "gone")),
		say(exportdv1.JobState_JOB_STATE_RUNNING, nil),
		say(exportdv1.JobState_JOB_STATE_SUCCEEDED, nil),
	}
	var states []exportdv1.JobState
	for job, err := range f.serve(t).Watch(context.Background(), jobID) {
		if err != nil {
			t.Fatal(err)
		}
		states = append(states, job.GetState())
	}
	want := []exportdv1.JobState{
		exportdv1.JobState_JOB_STATE_PENDING, exportdv1.JobState_JOB_STATE_RUNNING, exportdv1.JobState_JOB_STATE_SUCCEEDED,
	}
	if !slices.Equal(states, want) {
		t.Errorf("saw %v", states)
	}
}

func TestAWatchEndsAtOnceWithALastingError(t *testing.T) {
	f := newFake(0, 0, rows)
	f.watches = []func(watching) error{func(watching) error { return refused(codes.NotFound, "JOB_NOT_FOUND") }}
	var errs []error
	for _, err := range f.serve(t).Watch(context.Background(), jobID) {
		errs = append(errs, err)
	}
	if len(errs) != 1 || Reason(errs[0]) != "JOB_NOT_FOUND" {
		t.Error(errs)
	}
}
