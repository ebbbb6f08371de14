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
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
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

func TestATokenThatNoHeaderTakesIsRefusedWithoutShowingIt(t *testing.T) {
	for _, token := range []string{"", "s3cret\n", "s3cret two", "s3cret\t", "\x00s3cret", "s3crét", "s3cret\xff", "s3cret\x7f"} {
		_, err := NewClient("localhost:1", WithPlaintext(), WithToken(token))
		if err == nil || !strings.Contains(err.Error(), "token") || strings.Contains(err.Error(), "s3c") {
			t.Errorf("%q: %v", token, err)
		}
	}
}

func TestACallThatIsNotAnsweredEnds(t *testing.T) {
	f := newFake(0, 0, rows)
	f.getJob = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	client := f.serve(t)
	client.timeout = 50 * time.Millisecond
	_, err := client.GetJob(context.Background(), &exportdv1.GetJobRequest{})
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "within 0.05 s") {
		t.Error(err)
	}
	// A download may take long; its question about the job may not.
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	if _, err := client.Download(ctx, jobID, emptyAfter(t)); status.Code(err) != codes.DeadlineExceeded {
		t.Error(err)
	}
}

func TestTheDeadlineOfTheCallerWins(t *testing.T) {
	var left time.Duration
	invoke := func(ctx context.Context, _ string, _, _ any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
		deadline, _ := ctx.Deadline()
		left = time.Until(deadline)
		return nil
	}
	client := &Client{timeout: callTimeout}
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	if err := client.limit(ctx, "", nil, nil, nil, invoke); err != nil || left <= callTimeout {
		t.Errorf("with an hour, %s are left (%v)", left, err)
	}
	if err := client.limit(context.Background(), "", nil, nil, nil, invoke); err != nil || left > callTimeout || left <= 0 {
		t.Errorf("without a deadline, %s are left (%v)", left, err)
	}
}

func TestRetriesAreTheContractsWhateverTheResolverSays(t *testing.T) {
	f := newFake(0, 0, rows)
	calls := 0
	f.getJob = func(context.Context) error {
		if calls++; calls == 1 {
			return status.Error(codes.Unavailable, "gone")
		}
		return nil
	}
	address := f.listen(t)
	dns := manual.NewBuilderWithScheme("test")
	dns.BuildCallback = func(_ resolver.Target, conn resolver.ClientConn, _ resolver.BuildOptions) {
		dns.InitialState(resolver.State{
			Addresses:     []resolver.Address{{Addr: address}},
			ServiceConfig: conn.ParseServiceConfig(`{"methodConfig": []}`),
		})
	}
	client, err := NewClient("test:///exports", WithPlaintext(), WithDialOptions(grpc.WithResolvers(dns)))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.GetJob(context.Background(), &exportdv1.GetJobRequest{JobId: jobID}); err != nil || calls != 2 {
		t.Errorf("%v after %d calls", err, calls)
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

func TestAPauseIsAsLongAsTheServerAsksWithinBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for asked, want := range map[time.Duration]time.Duration{
			0: minPause, 2 * time.Second: 2 * time.Second, time.Hour: maxPause, -time.Second: minPause,
		} {
			var tries attempts
			started := time.Now()
			if err := tries.pause(t.Context(), later(codes.ResourceExhausted, "QUOTA_EXCEEDED", asked)); err != nil {
				t.Error(err)
			}
			if took := time.Since(started); took > want || took < want/2 || (want > minPause && took != want) {
				t.Errorf("asked for %s, paused %s", asked, took)
			}
		}
	})
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

func TestAWatchWaitsWhenAQuotaIsUsedUp(t *testing.T) {
	f := newFake(0, 0, rows)
	f.watches = []func(watching) error{
		func(watching) error { return later(codes.ResourceExhausted, "QUOTA_EXCEEDED", time.Millisecond) },
		func(to watching) error { return to.Send(&exportdv1.WatchJobResponse{Job: f.job}) },
	}
	for _, err := range f.serve(t).Watch(context.Background(), jobID) {
		if err != nil {
			t.Error(err)
		}
	}
	if len(f.watches) > 0 {
		t.Error("it did not come back")
	}
}

func TestAWatchThatAlwaysBreaksOffIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stub := &watchStub{}
		stub.open = func(context.Context) func() (*exportdv1.WatchJobResponse, error) {
			said := false
			return func() (*exportdv1.WatchJobResponse, error) {
				if said {
					return nil, status.Error(codes.Unavailable, "gone")
				}
				said = true
				return &exportdv1.WatchJobResponse{Job: &exportdv1.Job{Revision: 7}}, nil
			}
		}
		if err := stub.end(t); status.Code(err) != codes.Unavailable || stub.streams != maxAttempts {
			t.Errorf("%v after %d streams", err, stub.streams)
		}
	})
}

func TestAWatchOfASilentServerEndsAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stub := &watchStub{}
		stub.open = func(ctx context.Context) func() (*exportdv1.WatchJobResponse, error) {
			return func() (*exportdv1.WatchJobResponse, error) {
				<-ctx.Done()
				return nil, status.FromContextError(ctx.Err()).Err()
			}
		}
		err := stub.end(t)
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "nothing for 60 s") || stub.streams != maxAttempts {
			t.Errorf("%v after %d streams", err, stub.streams)
		}
	})
}

func TestNewsOrAStreamThatLastedLetAWatchGoOn(t *testing.T) {
	for name, c := range map[string]struct {
		news  int64
		pause time.Duration
	}{"news": {1, 0}, "lasted": {0, 6 * time.Second}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				stub := &watchStub{}
				stub.open = func(context.Context) func() (*exportdv1.WatchJobResponse, error) {
					messages := 0
					return func() (*exportdv1.WatchJobResponse, error) {
						messages++
						switch {
						case stub.streams > 3*maxAttempts:
							return nil, refused(codes.NotFound, "JOB_NOT_FOUND")
						case messages > 2:
							return nil, status.Error(codes.Unavailable, "gone")
						}
						time.Sleep(c.pause)
						return &exportdv1.WatchJobResponse{Job: &exportdv1.Job{Revision: c.news * int64(stub.streams)}}, nil
					}
				}
				if err := stub.end(t); Reason(err) != "JOB_NOT_FOUND" {
					t.Errorf("%v after %d streams", err, stub.streams)
				}
			})
		})
	}
}

func TestAWatchUntilDeliveredGoesOnWhileDeliveriesArePending(t *testing.T) {
	say := func(status exportdv1.DeliveryStatus) func(watching) error {
		return func(to watching) error {
			return to.Send(&exportdv1.WatchJobResponse{Job: &exportdv1.Job{
				State: exportdv1.JobState_JOB_STATE_SUCCEEDED, DeliveryStatus: status,
			}})
		}
	}
	for want, options := range map[int][]WatchOption{1: nil, 2: {UntilDelivered()}} {
		f := newFake(0, 0, rows)
		f.watches = []func(watching) error{
			say(exportdv1.DeliveryStatus_DELIVERY_STATUS_PENDING), say(exportdv1.DeliveryStatus_DELIVERY_STATUS_FAILED),
		}
		seen := 0
		for _, err := range f.serve(t).Watch(context.Background(), jobID, options...) {
			if err != nil {
				t.Fatal(err)
			}
			seen++
		}
		if seen != want {
			t.Errorf("ended after %d messages, not %d", seen, want)
		}
		if f.untilDelivered != (want == 2) {
			t.Error("the server was not told how long to go on")
		}
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
