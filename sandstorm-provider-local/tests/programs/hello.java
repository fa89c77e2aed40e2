package greetings;

import java.security.SecureRandom;
import java.util.Scanner;

interface Named {}

public final class Hello implements Named {
    public static void main(String[] words) {
        new SecureRandom().nextInt();
        System.out.println("hello " + new Scanner(System.in).nextLine() + " " + String.join(",", words));
        System.err.println("warned");
        System.exit(3);
    }
}
